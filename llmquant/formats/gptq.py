"""The GPTQ layout, version 1, as AutoGPTQ introduced it and vLLM, SGLang, transformers and llama.cpp read it.

    <p>.qweight  int32 [n * bits / 32, m]  codes, packed along n: the transpose of words along a row
    <p>.qzeros   int32 [G, m * bits / 32]  zero points minus one, packed along m
    <p>.scales   fp16  [G, m]
    <p>.g_idx    int32 [n]                 group of each column; transformers refuses files without it

Version 1 stores z - 1, and loaders put the one back with a single addition to each packed word. A stored 15 (z = 0)
would carry into its neighbour's bits there, so an asymmetric weight must keep every zero point at 1 or above.
Servers run only symmetric weights of this layout.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import CheckpointError, RecipeError
from llmquant.formats import bits
from llmquant.formats.checks import read_checked, read_scheme, stored_scales
from llmquant.scheme import Quantized, Scheme
from llmquant.version import __version__

NAME = "gptq"

# Servers fuse these linears and look up the rules of `dynamic` under the fused name.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def specs(
    prefix: str, m: int, n: int, scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes in file order. Scales are fp16 whatever the model's `dtype` is."""
    groups = scheme.groups(n)
    return {
        f"{prefix}.qweight": (torch.int32, (bits.words(n, scheme.bits), m)),
        f"{prefix}.qzeros": (torch.int32, (groups, bits.words(m, scheme.bits))),
        f"{prefix}.scales": (torch.float16, (groups, m)),
        f"{prefix}.g_idx": (torch.int32, (n,)),
    }


def pack(prefix: str, q: Quantized, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `specs`.

    Raises:
        RecipeError: a zero point is 0.
        NumericsError: a scale is not exact in fp16.
    """
    if not bool(q.zeros.all()):
        row, group = torch.nonzero(q.zeros == 0)[0].tolist()
        raise RecipeError(
            f"{prefix}.qzeros: row {row}, group {group} has zero point 0, which gptq cannot store; "
            "use --sym or --format compressed-tensors"
        )
    n = q.codes.shape[1]
    return {
        f"{prefix}.qweight": bits.pack(q.codes, scheme.bits).T.contiguous(),
        f"{prefix}.qzeros": bits.pack((q.zeros - 1).T, scheme.bits),
        f"{prefix}.scales": stored_scales(f"{prefix}.scales", q.scales.T, torch.float16),
        f"{prefix}.g_idx": _group_of_column(n, scheme).to(q.codes.device),
    }


def unpack(prefix: str, read: Callable[[str], Tensor], m: int, n: int, scheme: Scheme) -> Quantized:
    """The inverse of `pack`.

    Raises:
        CheckpointError: a tensor is malformed, or the columns' groups are not in order.
    """
    tensors = read_checked(read, specs(prefix, m, n, scheme, torch.float16))
    if not torch.equal(tensors["g_idx"].cpu(), _group_of_column(n, scheme)):
        raise CheckpointError(
            f"{prefix}.g_idx: columns are not in the order of their groups (desc_act); "
            "quantize the model without activation reordering"
        )
    return Quantized(
        bits.unpack(tensors["qweight"].T, scheme.bits, n),
        tensors["scales"].T.float().contiguous(),
        (bits.unpack(tensors["qzeros"], scheme.bits, m).T + 1).contiguous() & scheme.max_code,
    )


def refuse(m: int, n: int, scheme: Scheme) -> str | None:
    """Why a linear of this shape cannot be held; None if it can."""
    if scheme.bits == 3:
        return "3 bits are stored in another order, which few servers read"
    if n % scheme.width(n):
        return f"group size {scheme.group_size} does not divide {n} columns"
    per_word = 32 // scheme.bits
    return f"{m} x {n} is not a multiple of {per_word} both ways" if m % per_word or n % per_word else None


def caveats(schemes: Collection[Scheme]) -> list[str]:
    """What a user should know about clients of this layout that cannot read these schemes."""
    found = []
    if len(schemes) > 1:
        found.append(
            "transformers reads a single scheme of gptq files; vLLM reads several, and so does compressed-tensors"
        )
    if any(scheme.group_size == -1 for scheme in schemes):
        found.append("transformers' CPU kernel for gptq files needs groups of 32, 64 or 128; use compressed-tensors")
    return found


def config_block(schemes: Mapping[str, Scheme], skipped: Sequence[str]) -> dict[str, Any]:
    """The most frequent scheme at the top level, exceptions as `dynamic` rules.

    transformers ignores `dynamic` and wants the list of quantized modules, in lists of lists; vLLM reads both.
    """
    usual = Counter(schemes.values()).most_common(1)[0][0]
    block = {
        "quant_method": NAME,
        **_options(usual),
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "lm_head": "lm_head" in schemes,
        "pack_dtype": "int32",
        "checkpoint_format": "gptq",
        "format": "gptq",
        "meta": {"quantizer": [f"llmquant:{__version__}"]},
    }
    if skipped:
        block["modules_in_block_to_quantize"] = [[name] for name in schemes]
    rules: dict[str, Any] = {f"-:{_exactly(name)}": {} for name in _with_fused(dict.fromkeys(skipped))}
    unusual = _with_fused({name: scheme for name, scheme in schemes.items() if scheme != usual})
    rules |= {f"+:{_exactly(name)}": _options(scheme) for name, scheme in unusual.items()}
    return block | ({"dynamic": rules} if rules else {})


def read_config(block: dict[str, Any], linears: Sequence[str]) -> dict[str, Scheme]:
    """Which linears are quantized, and how.

    Raises:
        CheckpointError: another version of the layout, or a scheme or rule that cannot be read.
    """
    version = block.get("checkpoint_format", block.get("format", "gptq"))
    if version != "gptq":
        raise CheckpointError(
            f"config.json: quantization_config: checkpoint_format {version!r} is not supported; save it as 'gptq'"
        )
    schemes = {}
    for name in filter(lambda name: _is_listed(name, block), linears):
        options = _overridden(name, block)
        if options is not None:
            schemes[name] = read_scheme(options.get("bits"), options.get("group_size"), options.get("sym", True))
            if schemes[name].bits == 3:
                raise CheckpointError("config.json: quantization_config: bits: 3 is not supported in this layout")
    return schemes


def _group_of_column(n: int, scheme: Scheme) -> Tensor:
    return torch.arange(n, dtype=torch.int32) // scheme.width(n)


def _options(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def _with_fused(rules: dict[str, Any]) -> dict[str, Any]:
    """The same rules, and those that all parts of a fused linear share under its name too."""
    fused = {}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in rules):
        for whole, parts in FUSED.items():
            found = [rules.get(f"{parent}.{part}", parts) for part in parts]
            if all(rule == found[0] for rule in found) and found[0] is not parts:
                fused[f"{parent}.{whole}"] = found[0]
    return rules | fused


def _is_listed(name: str, block: dict[str, Any]) -> bool:
    """By the list of modules if there is one, else every linear of a numbered layer."""
    listed = block.get("modules_in_block_to_quantize")
    if listed is not None:
        return any(name.endswith(entry) for entries in listed for entry in _flat(entries))
    return any(part.isdigit() for part in name.split(".")) or (name == "lm_head" and block.get("lm_head") is True)


def _flat(entries: str | list[str]) -> list[str]:
    return [entries] if isinstance(entries, str) else entries


def _overridden(name: str, block: dict[str, Any]) -> dict[str, Any] | None:
    """The block with the first rule of `dynamic` that matches laid over it; None if that rule skips the linear."""
    for rule, options in (block.get("dynamic") or {}).items():
        sign, pattern = (rule[:2], rule[2:]) if rule[:2] in ("-:", "+:") else ("+:", rule)
        try:
            matched = re.match(pattern, name)
        except re.error as error:
            raise CheckpointError(
                f"config.json: quantization_config: dynamic: {rule!r} is no pattern: {error}"
            ) from error
        if matched:
            return None if sign == "-:" else block | options
    return block
