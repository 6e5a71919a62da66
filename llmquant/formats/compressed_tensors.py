"""The compressed-tensors layout "pack-quantized": the native one of vLLM, read by SGLang and transformers too.

    <p>.weight_packed      int32 [m, ceil(n * bits / 32)]  codes, packed along n
    <p>.weight_scale       float [m, G]                    in the model's dtype
    <p>.weight_zero_point  int32 [ceil(m * bits / 32), G]  packed along m; only if asymmetric
    <p>.weight_shape       int64 [2]                       m, n
    <p>.weight_g_idx       int32 [n]                       group of each column; older files, only if reordered

The library speaks of signed codes and stores them with 2**(bits - 1) added: our unsigned codes, and zero points alike.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import CheckpointError
from llmquant.formats import bits
from llmquant.formats.checks import check_in_place, column_order, read_checked, read_scheme, stored_scales
from llmquant.scheme import Quantized, Scheme
from llmquant.version import __version__

NAME = "compressed-tensors"
LAYOUT = "pack-quantized"


def specs(
    prefix: str, m: int, n: int, scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes in file order."""
    groups = scheme.groups(n)
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{prefix}.weight_packed": (torch.int32, (m, bits.words(n, scheme.bits))),
        f"{prefix}.weight_scale": (dtype, (m, groups)),
    }
    if not scheme.symmetric:
        found[f"{prefix}.weight_zero_point"] = (torch.int32, (bits.words(m, scheme.bits), groups))
    return found | {f"{prefix}.weight_shape": (torch.int64, (2,))}


def pack(
    prefix: str, q: Quantized, scheme: Scheme, dtype: torch.dtype, order: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of `specs`.

    Raises:
        NumericsError: a scale is not exact in `dtype`.
        RecipeError: the columns are reordered, which loaders of today no longer read.
    """
    check_in_place(prefix, order, NAME)
    tensors = {
        f"{prefix}.weight_packed": bits.pack(q.codes, scheme.bits),
        f"{prefix}.weight_scale": stored_scales(f"{prefix}.weight_scale", q.scales, dtype),
    }
    if not scheme.symmetric:
        tensors[f"{prefix}.weight_zero_point"] = bits.pack(q.zeros.T, scheme.bits).T.contiguous()
    return tensors | {f"{prefix}.weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64)}


def unpack(prefix: str, stored: Mapping[str, Tensor], m: int, n: int, scheme: Scheme) -> Quantized:
    """The inverse of `pack`.

    Raises:
        CheckpointError: a tensor is malformed.
    """
    tensors = read_checked(stored, specs(prefix, m, n, scheme, torch.float32))
    if (shape := tensors["weight_shape"].tolist()) != [m, n]:
        raise CheckpointError(
            f"{prefix}.weight_shape: is {shape}, expected {[m, n]}; is config.json of this checkpoint?"
        )
    scales = tensors["weight_scale"].float()
    zeros = torch.full(scales.shape, scheme.midpoint, dtype=torch.uint8, device=scales.device)
    if not scheme.symmetric:
        zeros = bits.unpack(tensors["weight_zero_point"].T, scheme.bits, m).T.contiguous()
    codes = bits.unpack(tensors["weight_packed"], scheme.bits, n)
    columns = order(prefix, stored, n, scheme)
    return Quantized(codes if columns is None else codes[:, columns], scales, zeros)


def order(prefix: str, stored: Mapping[str, Tensor], n: int, scheme: Scheme) -> Tensor | None:
    """The columns of the weight that `unpack` gives, in their order; None if they are in place."""
    name = f"{prefix}.weight_g_idx"
    return column_order(name, stored[name], n, scheme) if name in stored else None


def refuse(m: int, n: int, scheme: Scheme) -> str | None:
    """Why a linear of this shape cannot be held; None if it can. Rows may end inside a word."""
    return f"group size {scheme.group_size} does not divide {n} columns" if n % scheme.width(n) else None


def caveats(schemes: Collection[Scheme]) -> list[str]:
    """What a user should know about clients of this layout that cannot read these schemes."""
    found = []
    if len(schemes) > 1 and not all(scheme.symmetric for scheme in schemes):
        found.append("transformers refuses asymmetric weights in more than one scheme; vLLM reads them")
    if any(scheme.bits == 3 for scheme in schemes):
        found.append("vLLM has no kernel for 3 bits; transformers reads them")
    return found


def config_block(schemes: Mapping[str, Scheme], skipped: Sequence[str]) -> dict[str, Any]:
    """One group per scheme. A single scheme is that of every Linear not ignored; several name their linears.

    With a single asymmetric scheme `dequantize` is set: transformers reads it only so, servers ignore it. With several
    schemes that would make it read all linears by the first, wrongly and in silence; without, it refuses zero points.
    """
    distinct = list(dict.fromkeys(schemes.values()))
    members = {scheme: [name for name, own in schemes.items() if own == scheme] for scheme in distinct}
    targets = members if len(distinct) > 1 else {distinct[0]: ["Linear"]}
    block = {
        "quant_method": NAME,
        "format": LAYOUT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(skipped),
        "config_groups": {f"group_{i}": _group(scheme, targets[scheme]) for i, scheme in enumerate(distinct)},
        "meta": {"quantizer": [f"llmquant:{__version__}"]},  # loaders ignore it; ours knows its own by it
    }
    return block | {"dequantize": True} if len(distinct) == 1 and not distinct[0].symmetric else block


def read_config(block: dict[str, Any], linears: Sequence[str]) -> dict[str, Scheme]:
    """Which linears are quantized, and how; also from what llm-compressor writes.

    Raises:
        CheckpointError: another layout than pack-quantized, a group or pattern that cannot be read, or something
            beside integer weights: sparsity, rotations, a quantized cache.
    """
    for option in ("sparsity_config", "transform_config", "kv_cache_scheme"):
        if block.get(option):
            raise CheckpointError(
                f"config.json: quantization_config: {option} is not supported; use a checkpoint of packed weights alone"
            )
    ignored = _Targets(block.get("ignore") or [])
    told = block.get("config_groups") or {}
    if not isinstance(told, dict) or not all(isinstance(group, dict) for group in told.values()):
        raise CheckpointError(
            "config.json: quantization_config: config_groups: are no groups; fetch the checkpoint again"
        )
    groups = [(_Targets(group.get("targets")), _scheme(group, block)) for group in told.values()]
    schemes = {}
    for name in linears:
        if ignored.fit(name):
            continue
        ranked = [(targets.fit(name), scheme) for targets, scheme in groups]
        rank, scheme = max(ranked, key=lambda pair: pair[0], default=(0, None))
        if rank and scheme:
            schemes[name] = scheme
    return schemes


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    channel = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _scheme(group: dict[str, Any], block: dict[str, Any]) -> Scheme:
    """The scheme of a config group, if all that it asks for is integer weights in this layout."""
    weights = group.get("weights") or {}
    group_size = -1 if weights.get("strategy") == "channel" else weights.get("group_size")
    wanted = {
        "format": (group.get("format") or block.get("format"), (LAYOUT,)),
        "input_activations": (group.get("input_activations"), (None,)),
        "type": (weights.get("type", "int"), ("int",)),
        "strategy": (weights.get("strategy", "group"), ("group", "channel")),
        "actorder": (weights.get("actorder"), (None, True, False, "weight", "static", "group")),
    }
    for option, (value, known) in wanted.items():
        if value not in known:
            raise CheckpointError(
                f"config.json: quantization_config: {option} {value!r} is not supported; "
                f"use a checkpoint with {' or '.join(map(repr, known))}"
            )
    return read_scheme(weights.get("num_bits"), group_size, weights.get("symmetric", True))


class _Targets:
    """Names, patterns and a class; a mixture has tens of thousands of linears, each of which is looked for."""

    def __init__(self, targets: Any) -> None:
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise CheckpointError(
                f"config.json: quantization_config: {targets!r:.80} is no list of names; fetch the checkpoint again"
            )
        self.names = {*targets}
        self.patterns = [_pattern(target) for target in targets if target.startswith("re:")]

    def fit(self, name: str) -> int:
        """How well they fit a linear: 3 by its name, 2 by a pattern, 1 by its class, 0 not at all."""
        if name in self.names:
            return 3
        if any(pattern.match(name) for pattern in self.patterns):
            return 2
        return int("Linear" in self.names)


def _pattern(target: str) -> re.Pattern[str]:
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise CheckpointError(f"config.json: quantization_config: {target!r} is no pattern: {error}") from error
