"""Which linears a `quantization_config` of the GPTQ family means, and with which options.

GPTQ, AWQ and AutoRound files say it in keys of their own. No key of one means something else to another, so that all of
them are read together:

    lm_head                       whether the output head is quantized; nothing else outside of numbered layers can be
    modules_in_block_to_quantize  GPTQ: lists of lists of endings of names; all others stay as they are
    block_name_to_quantize        AutoRound: prefixes, as a list or separated by commas
    modules_to_not_convert        AWQ: parts of names
    dynamic                       GPTQModel: `-:regex` skips, `+:regex` or `regex` changes options; the first counts
    extra_config                  AutoRound: a name or regex changes options, the name before the regex; 16 bits skip
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from llmquant.errors import CheckpointError

Options = dict[str, Any]
MAX_BITS = 8  # what asks for more stays as it is

# What would change the meaning of the integers, and the values under which it does not.
PLAIN: dict[str, tuple[Any, ...]] = {
    "is_marlin_format": (None, False),
    "pack_dtype": (None, "int32"),
    "data_type": (None, "int"),
    "act_bits": (None, 16, 32),
    "rotation_config": (None, {}),
    "adapter": (None, {}),
}


def settings(block: Options, linears: Sequence[str]) -> dict[str, Options]:
    """The options of each linear that is quantized: the block with the linear's own laid over it.

    Raises:
        CheckpointError: an option or rule that cannot be followed, by name.
    """
    found = {}
    for name in linears:
        own = _own(name, block)
        if own is None or not _is_listed(name, block, own):
            continue
        for option, plain in PLAIN.items():
            if (value := own.get(option)) not in plain:
                raise CheckpointError(
                    f"config.json: quantization_config: {option} {value!r} is not supported; use a checkpoint without"
                )
        found[name] = own
    return found


def _is_listed(name: str, block: Options, own: Options) -> bool:
    if not any(part.isdigit() for part in name.split(".")):
        return name.endswith("lm_head") and (block.get("lm_head") is True or name in (block.get("extra_config") or {}))
    endings = block.get("modules_in_block_to_quantize")
    prefixes = block.get("block_name_to_quantize") or block.get("to_quant_block_names")
    return (
        (endings is None or any(name.endswith(ending) for ending in _flat(endings)))
        and (prefixes is None or any(name.startswith(f"{prefix}.") for prefix in _flat(prefixes)))
        and not any(part in name for part in _flat(block.get("modules_to_not_convert")))
    )


def _own(name: str, block: Options) -> Options | None:
    """The options of a linear; None if a rule skips it."""
    for rule, options in (block.get("dynamic") or {}).items():
        sign, pattern = (rule[:2], rule[2:]) if rule[:2] in ("-:", "+:") else ("+:", rule)
        if _matches("dynamic", pattern, name):
            return None if sign == "-:" else block | options
    extra = block.get("extra_config") or {}
    matching = [name] if name in extra else [rule for rule in extra if _matches("extra_config", rule, name)]
    own = block | extra[matching[0]] if matching else block
    bits = own.get("bits")
    return None if type(bits) is int and bits > MAX_BITS else own


def _matches(option: str, pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise CheckpointError(
            f"config.json: quantization_config: {option}: {pattern!r} is no pattern: {error}"
        ) from error


def _flat(names: Any) -> Iterator[str]:
    """The names in a list of any depth, or in a text that separates them by commas."""
    if isinstance(names, str):
        yield from (name.strip() for name in names.split(","))
    else:
        for entry in names or ():
            yield from _flat(entry)
