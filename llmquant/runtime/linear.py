"""A linear layer that keeps its weight packed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmquant.formats import FORMATS, Format
from llmquant.kernels import ops
from llmquant.kernels.backends import Kernels, kernels_for
from llmquant.kernels.cpu import PLANES
from llmquant.kernels.layout import Packed
from llmquant.model.noted import Noted
from llmquant.scheme import Quantized, Scheme

W4_LINEAR = torch.ops.llmquant.w4_linear.default


class Stored(NamedTuple):
    """How a checkpoint holds the weight, which is what `state_dict` gives."""

    format: Format
    scheme: Scheme
    dtype: torch.dtype  # of the scales

    def __deepcopy__(self, _: dict[int, Any]) -> "Stored":
        return self


class QuantLinear(Noted):
    """y = x W^T + bias, with W [m, n] in integers; x [..., n] in bf16, fp16 or fp32 gives y [..., m] of the same.

    Attributes:
        codes, scales, zeros: the weight, packed for the kernels of the device that it is on.
        order: int64 [n], the feature of x that each column of the codes multiplies; None where they are in place.
        bias: [m], or None.
        precision: of the activations on the CPU, "exact" or "int8"; see `kernels.cpu`.

    A weight or a precision that is replaced is a change that is noted.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        m: int,
        n: int,
        scheme: Scheme,
        panels: Packed,
        stored: Stored | None = None,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features = n
        self.out_features = m
        self.scheme = scheme
        self.stored = stored or Stored(FORMATS["compressed-tensors"], scheme, panels.scales.dtype)
        self._precision = "exact"
        for name, buffer in panels._asdict().items():
            self.register_buffer(name, buffer)
        self.register_buffer("order", order)
        self.register_parameter("bias", None)

    @classmethod
    def from_quantized(
        cls,
        q: Quantized,
        scheme: Scheme,
        bias: nn.Parameter | None = None,
        stored: Stored | None = None,
        order: Tensor | None = None,
    ) -> "QuantLinear":
        """Pack a quantized weight. The kernels know 4 and 8 bits: 3-bit codes take the room of 4-bit ones here."""
        held = Scheme(4, scheme.group_size, symmetric=False) if scheme.bits == 3 else scheme
        m, n = q.codes.shape
        linear = cls(m, n, held, kernels_for(q.codes.device.type, held.bits).pack(q, held), stored, order)
        linear.bias = bias
        return linear

    @property
    def precision(self) -> str:
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        self._precision = precision
        Noted.changes += 1

    @property
    def packed(self) -> Packed:
        return Packed(self.codes, self.scales, self.zeros)

    @property
    def kernels(self) -> Kernels:
        return kernels_for(self.codes.device.type, self.scheme.bits)

    def forward(self, x: Tensor) -> Tensor:
        held = self._buffers  # not as attributes: a look into each of nn.Module's dictionaries costs a microsecond
        if (order := held["order"]) is not None:
            x = x.index_select(-1, order)
        weight = held["codes"], held["scales"], held["zeros"], self._parameters["bias"], self.out_features
        try:
            return W4_LINEAR(x, *weight, self.scheme.bits, self.scheme.group_size, PLANES[self._precision])
        except RuntimeError as error:
            raise ops.as_raised(error) from None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        q = self.kernels.unpack(self.packed, self.out_features, self.in_features, self.scheme)
        layout, scheme, dtype = self.stored
        destination.update(layout.pack(prefix.removesuffix("."), q, scheme, dtype, self.order))
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Raises KeyError if a tensor is missing, CheckpointError if it is malformed."""
        m, n, name, layout = self.out_features, self.in_features, prefix.removesuffix("."), self.stored.format
        q = layout.unpack(name, state_dict, m, n, self.stored.scheme)
        order = layout.order(name, state_dict, n, self.stored.scheme)
        if self.codes.device.type != "meta":
            q = Quantized(*(part.to(self.codes.device) for part in q))
        self.order = None if order is None else order.to(q.codes.device)
        self._hold(kernels_for(q.codes.device.type, self.scheme.bits).pack(q, self.scheme))
        Noted.changes += 1
        if self.bias is not None:
            self.bias.data.copy_(state_dict[f"{prefix}bias"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Move as told, but keep the scales' precision: a cast of the model is meant for what flows through it.

        Another device may want another layout: the GPU packs and unpacks, whether the weight goes there or comes.
        """
        before, after = self.codes.device.type, fn(self.codes.new_empty(0)).device.type
        if before == "cuda" != after != "meta":
            self._lay_out(before, after)
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = self.scales.to(scales.dtype) if scales.is_meta else scales.to(self.scales.device)
        if after == "cuda" != before != "meta":
            self._lay_out(before, after)
        Noted.changes += 1
        return self

    def _lay_out(self, before: str, after: str) -> None:
        """Pack the weight for the kernels of another type of device than those that it is packed for."""
        old, new = (kernels_for(device, self.scheme.bits) for device in (before, after))
        if old != new:
            q = old.unpack(self.packed, self.out_features, self.in_features, self.scheme)
            self._hold(new.pack(q, self.scheme))

    def _hold(self, packed: Packed) -> None:
        for name, buffer in packed._asdict().items():
            self._buffers[name] = buffer
