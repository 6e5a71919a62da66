"""`import llmquant` makes `from_pretrained` use our kernels, and must not import transformers for it.

transformers looks for a quantizer by the `quant_method` of config.json, and ours is that of another package, so that
the same directory loads where llmquant is not installed. What it calls to settle the matter, with the stored block
and the `quantization_config` of the call in hand, is `AutoHfQuantizer.merge_quantization_configs`. We answer first
for what is ours: a checkpoint that llmquant wrote, if the call says nothing, and any that it can read, if the call
says `LlmquantConfig()`. All else goes to transformers, as before.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TARGET = "transformers.quantizers.auto"


def install() -> None:
    """Answer for our checkpoints: now if transformers has loaded its quantizers, else as soon as it does."""
    if TARGET in sys.modules:
        _answer_first(sys.modules[TARGET])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Waits for one module, and steps aside."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TARGET:
            return None
        from importlib.util import find_spec  # not above: it takes longer than all the rest of `import llmquant`

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_answer(module: ModuleType) -> None:
            execute(module)
            _answer_first(module)

        spec.loader.exec_module = execute_and_answer  # type: ignore[method-assign]
        return spec


def _answer_first(auto: ModuleType) -> None:
    from functools import wraps

    theirs = auto.AutoHfQuantizer.merge_quantization_configs
    if hasattr(theirs, "__wrapped__"):
        return

    @wraps(theirs)
    def merge(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        asked, block = quantization_config_from_args, quantization_config
        if isinstance(block, dict) and (asked is not None or is_ours(block)):
            from llmquant.runtime.transformers_plugin import LlmquantConfig  # transformers is whole by now

            if asked is None or isinstance(asked, LlmquantConfig):
                return (asked or LlmquantConfig()).of(block)
        return theirs(block, asked)

    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(merge)


def is_ours(block: dict[str, Any]) -> bool:
    """Whether a `quantization_config` says that llmquant wrote the checkpoint."""
    writers = (block.get("meta") or {}).get("quantizer") or []
    return any(str(writer).startswith("llmquant:") for writer in writers)
