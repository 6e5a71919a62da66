"""A linear layer that keeps its weight packed."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmquant.kernels import ops  # noqa: F401  (defines torch.ops.llmquant)
from llmquant.kernels.reference import pack_codes
from llmquant.scheme import Quantized, Scheme


class QuantLinear(nn.Module):
    """y = x W^T + bias, with W [m, n] in integers; x [..., n] of any floating-point dtype gives y [..., m] of the same.

    Attributes:
        packed: uint8 [m, ceil(n * bits / 8)], codes as in `kernels.reference`.
        scales: fp32 [m, G]. Checkpoints hold them in fp16 or bf16, neither of which contains the other.
        zeros: uint8 [m, G]; None if the scheme is symmetric.
        bias: [m], or None.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, n: int, scheme: Scheme, packed: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
        super().__init__()
        self.in_features = n
        self.out_features = len(packed)
        self.scheme = scheme
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_parameter("bias", None)

    @classmethod
    def from_quantized(cls, q: Quantized, scheme: Scheme, bias: nn.Parameter | None = None) -> "QuantLinear":
        """Pack a quantized weight. The kernels know 4 and 8 bits: 3-bit codes take the room of 4-bit ones here."""
        held = Scheme(4, scheme.group_size, symmetric=False) if scheme.bits == 3 else scheme
        zeros = None if held.symmetric else q.zeros
        linear = cls(q.codes.shape[1], held, pack_codes(q.codes, held.bits), q.scales, zeros)
        linear.bias = bias
        return linear

    def forward(self, x: Tensor) -> Tensor:
        bits, group_size = self.scheme.bits, self.scheme.group_size
        return torch.ops.llmquant.w4_linear(x, self.packed, self.scales, self.zeros, self.bias, bits, group_size)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Move as told, but keep the scales' precision: a cast of the model is meant for what flows through it."""
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.scales.device)
        return self
