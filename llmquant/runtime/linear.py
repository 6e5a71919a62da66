"""A linear layer that keeps its weight packed."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmquant.kernels import ops  # noqa: F401  (defines torch.ops.llmquant)
from llmquant.kernels.cpu import PLANES
from llmquant.kernels.layout import Panels, pack
from llmquant.scheme import Quantized, Scheme

W4_LINEAR = torch.ops.llmquant.w4_linear.default


class QuantLinear(nn.Module):
    """y = x W^T + bias, with W [m, n] in integers; x [..., n] of any floating-point dtype gives y [..., m] of the same.

    Attributes:
        codes, scales, zeros: the weight as `kernels.layout.Panels`.
        bias: [m], or None.
        precision: of the activations on the CPU, "exact" or "int8"; see `kernels.cpu`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, m: int, n: int, scheme: Scheme, panels: Panels) -> None:
        super().__init__()
        self.in_features = n
        self.out_features = m
        self.scheme = scheme
        self.precision = "exact"
        for name, buffer in panels._asdict().items():
            self.register_buffer(name, buffer)
        self.register_parameter("bias", None)

    @classmethod
    def from_quantized(cls, q: Quantized, scheme: Scheme, bias: nn.Parameter | None = None) -> "QuantLinear":
        """Pack a quantized weight. The kernels know 4 and 8 bits: 3-bit codes take the room of 4-bit ones here."""
        held = Scheme(4, scheme.group_size, symmetric=False) if scheme.bits == 3 else scheme
        m, n = q.codes.shape
        linear = cls(m, n, held, pack(q, held))
        linear.bias = bias
        return linear

    @property
    def panels(self) -> Panels:
        return Panels(self.codes, self.scales, self.zeros)

    def forward(self, x: Tensor) -> Tensor:
        held = self._buffers  # not as attributes: a look into each of nn.Module's dictionaries costs a microsecond
        weight = held["codes"], held["scales"], held["zeros"], self._parameters["bias"], self.out_features
        return W4_LINEAR(x, *weight, self.scheme.bits, self.scheme.group_size, PLANES[self.precision])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Move as told, but keep the scales' precision: a cast of the model is meant for what flows through it."""
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.scales.device)
        return self
