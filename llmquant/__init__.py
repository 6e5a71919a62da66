"""llmquant: INT4 quantization of Hugging Face LLM checkpoints, streamed, crash-safe and verified.

checkpoint/   safetensors directories on disk: validated reads, atomic writes, journal
model/        structure of an architecture; one layer in memory at a time
calibration/  text in, token batches out; activations from layer to layer
solve/        GPTQ, AWQ, refit, descent, training: pure functions on tensors
formats/      packed layouts: compressed-tensors, GPTQ, AWQ
convert/      a packed checkpoint in another layout
kernels/      INT4 matmul: the definition and the C++ path
runtime/      a packed checkpoint as a transformers model
server/       the same behind an HTTP interface
sensitivity/  which linears hurt; mixed precision under a budget
hub/          a finished directory on the Hub
report/       a finished run on one page
evaluate/     perplexity, KL divergence, agreement

plan.py decides everything, pipeline.py does it, unit by unit (unit.py), verify.py proves it.
"""

from typing import Any

from llmquant.runtime.transformers_hook import install
from llmquant.version import __version__

_HOMES = {  # imported on first use: `import llmquant` stays quick
    "quantize": "pipeline",
    "sense": "pipeline",
    "Options": "pipeline",
    "Recipe": "recipe",
    "Scheme": "scheme",
    "verify_checkpoint": "verify",
    "inspect_checkpoint": "inspect",
    "push": "hub.upload",
    "load": "runtime.loader",
    "LlmquantConfig": "runtime.transformers_plugin",
    "generate": "runtime.generate",
    "evaluate": "evaluate.run",
    "compare_checkpoints": "compare",
    "convert": "convert",
    "LlmquantError": "errors",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmquant' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"llmquant.{_HOMES[name]}"), name)


install()
