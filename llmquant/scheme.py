"""What a quantized linear is: the one number format that every other room speaks.

    W[m, n] = scales[m, j] * (codes[m, n] - zeros[m, j]),    j = n // group_size

Shapes, here and everywhere: `m` out features (rows), `n` in features (columns), `g` group size,
`G = ceil(n / g)` groups. Codes and zero points are unsigned, 0 .. 2**bits - 1; symmetric means
that every zero point is the midpoint 2**(bits - 1).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.errors import RecipeError

MIN_SCALE = 2.0**-14  # of a grid, in magnitude: smallest normal fp16
MAX_SCALE = 65280.0  # largest value exact in both fp16 and bf16
BITS = (3, 4, 8)
GROUP_SIZES = (-1, 32, 64, 128)  # -1: one group per row ("per channel")


@dataclass(frozen=True)
class Scheme:
    """Bits, group size and symmetry of one linear."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (read by the recipe's pydantic model)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise RecipeError(f"bits: {self.bits} is not supported; choose one of {BITS}")
        if self.group_size not in GROUP_SIZES:
            raise RecipeError(f"group_size: {self.group_size} is not supported; choose one of {GROUP_SIZES}")

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def midpoint(self) -> int:
        return 2 ** (self.bits - 1)

    def width(self, n: int) -> int:
        """Columns that share a scale in a row of `n` columns."""
        return n if self.group_size == -1 else self.group_size

    def groups(self, n: int) -> int:
        return -(-n // self.width(n))

    def __str__(self) -> str:
        group = "per-channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"int{self.bits} {group} {'symmetric' if self.symmetric else 'asymmetric'}"


class Quantized(NamedTuple):
    """A linear's weight in integers."""

    codes: Tensor  # uint8 [m, n]
    scales: Tensor  # fp32 [m, G], of either sign, each value exact in fp16 and in bf16
    zeros: Tensor  # uint8 [m, G]


def dequantize(q: Quantized, scheme: Scheme) -> Tensor:
    """The real weight, fp32 [m, n]."""
    m, n = q.codes.shape
    width = scheme.width(n)
    if n % width:  # the last group is shorter
        group = torch.arange(n, device=q.codes.device) // width
        return q.scales[:, group] * (q.codes.float() - q.zeros[:, group].float())
    codes = q.codes.view(m, -1, width).float()
    return codes.sub_(q.zeros.unsqueeze(-1)).mul_(q.scales.unsqueeze(-1)).view(m, n)
