"""Packed layouts: how integers, scales and zero points lie in a checkpoint. One module per layout.

Every layout is a bijection of `Quantized`: what goes in comes out, bit for bit.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llmquant.errors import CheckpointError
from llmquant.formats import awq, compressed_tensors, gptq
from llmquant.scheme import Quantized, Scheme


class Format(Protocol):
    """What the module of a layout offers. `prefix` is the linear's name in the checkpoint."""

    @property
    def NAME(self) -> str:
        """As `--format` and `--to` have it."""

    def specs(
        self, prefix: str, m: int, n: int, scheme: Scheme, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names, dtypes and shapes of the tensors that `pack` gives, in file order. `dtype` is the model's."""

    def pack(
        self, prefix: str, q: Quantized, scheme: Scheme, dtype: torch.dtype, order: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The tensors of `specs`. NumericsError if `dtype` cannot hold a scale exactly, RecipeError for `order`."""

    def unpack(self, prefix: str, stored: Mapping[str, Tensor], m: int, n: int, scheme: Scheme) -> Quantized:
        """The inverse of `pack`, from tensors by name. CheckpointError names the one that is malformed."""

    def order(self, prefix: str, stored: Mapping[str, Tensor], n: int, scheme: Scheme) -> Tensor | None:
        """Where columns are reordered, so that those of a group are neighbours: the weight's column that each column of
        `unpack` is, int64 [n]. None if they are in place."""

    def refuse(self, m: int, n: int, scheme: Scheme) -> str | None:
        """Why a linear of this shape cannot be held; None if it can."""

    def caveats(self, schemes: Collection[Scheme]) -> list[str]:
        """One sentence for each client that cannot read these schemes from this layout."""

    def config_block(self, schemes: Mapping[str, Scheme], skipped: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of config.json: every quantized linear, in model order, and every one left as it is.
        RecipeError if it cannot say so."""

    def read_config(self, block: dict[str, Any], linears: Sequence[str]) -> dict[str, Scheme]:
        """The inverse: of all the model's linears the quantized ones. CheckpointError on what cannot be read."""


FORMATS: dict[str, Format] = {format.NAME: format for format in (compressed_tensors, gptq.V1, gptq.V2, awq)}

# quant_method -> the options that tell layouts apart, the first that is given counts; what they mean; the usual.
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Format], str]] = {
    "compressed-tensors": ((), {"": compressed_tensors}, ""),
    "gptq": (("checkpoint_format", "format"), {"gptq": gptq.V1, "gptq_v2": gptq.V2}, "gptq"),
    "awq": (("version", "checkpoint_format", "format"), {"gemm": awq}, "gemm"),
    "auto-round": (
        ("packing_format",),
        {
            "auto_round:auto_gptq": gptq.V1,
            "auto_round": gptq.V2,
            "auto_round:gptqmodel": gptq.V2,
            "auto_round:auto_awq": awq,
        },
        "auto_round:auto_gptq",
    ),
}


def for_config(block: dict[str, Any]) -> Format:
    """The layout that a `quantization_config` names. CheckpointError if it is none of ours."""
    method = block.get("quant_method")
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise CheckpointError(
            f"config.json: quantization_config: quant_method {method!r} is not supported; use a checkpoint in {known}"
        )
    options, layouts, usual = METHODS[method]
    option, value = next(((name, block[name]) for name in options if block.get(name)), ("", usual))
    if (layout := layouts.get(str(value).lower())) is None:
        known = " or ".join(map(repr, layouts))
        raise CheckpointError(
            f"config.json: quantization_config: {option} {value!r} is not supported; use a checkpoint with {known}"
        )
    return layout
