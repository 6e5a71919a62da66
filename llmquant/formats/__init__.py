"""Packed layouts: how integers, scales and zero points lie in a checkpoint. One module per layout.

Every layout is a bijection of `Quantized`: what goes in comes out, bit for bit.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llmquant.errors import CheckpointError
from llmquant.formats import compressed_tensors, gptq
from llmquant.scheme import Quantized, Scheme


class Format(Protocol):
    """What the module of a layout offers. `prefix` is the linear's name in the checkpoint."""

    NAME: str

    def specs(
        self, prefix: str, m: int, n: int, scheme: Scheme, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names, dtypes and shapes of the tensors that `pack` gives, in file order. `dtype` is the model's."""

    def pack(self, prefix: str, q: Quantized, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of `specs`. NumericsError if `dtype` cannot hold a scale exactly."""

    def unpack(self, prefix: str, read: Callable[[str], Tensor], m: int, n: int, scheme: Scheme) -> Quantized:
        """The inverse of `pack`, from tensors by name. CheckpointError names the one that is malformed."""

    def refuse(self, m: int, n: int, scheme: Scheme) -> str | None:
        """Why a linear of this shape cannot be held; None if it can."""

    def caveats(self, schemes: Collection[Scheme]) -> list[str]:
        """One sentence for each client that cannot read these schemes from this layout."""

    def config_block(self, schemes: Mapping[str, Scheme], skipped: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of config.json: every quantized linear, in model order, and every one left as it is."""

    def read_config(self, block: dict[str, Any], linears: Sequence[str]) -> dict[str, Scheme]:
        """The inverse: of all the model's linears the quantized ones. CheckpointError on what cannot be read."""


FORMATS: dict[str, Format] = {format.NAME: format for format in (compressed_tensors, gptq)}


def for_config(block: dict[str, Any]) -> Format:
    """The layout that a `quantization_config` names. CheckpointError if it is none of ours."""
    method = block.get("quant_method")
    if method not in FORMATS:
        known = " or ".join(FORMATS)
        raise CheckpointError(
            f"config.json: quantization_config: quant_method {method!r} is not supported; use a checkpoint in {known}"
        )
    return FORMATS[method]
