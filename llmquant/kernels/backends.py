"""The kernels of each kind of device: how they want a weight, and what multiplies it."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

from torch import Tensor

from llmquant.kernels import layout, reference
from llmquant.kernels.layout import Packed
from llmquant.native import find_gpu_backend
from llmquant.scheme import Quantized, Scheme

Shape = tuple[int, ...]


class Kernels(NamedTuple):
    shapes: Callable[[int, int, Scheme], tuple[Shape, Shape, Shape]]  # of the codes, the scales and the zeros
    pack: Callable[[Quantized, Scheme], Packed]
    unpack: Callable[[Packed, int, int, Scheme], Quantized]
    linear: Callable[[Tensor, Packed, Tensor | None, int, Scheme], Tensor]  # x contiguous; as `reference.linear`


PANELS = Kernels(layout.shapes, layout.pack, layout.unpack, reference.linear)


@cache
def kernels_for(device: str, bits: int) -> Kernels:
    """For a type of device and codes of so many bits. The CPU's native product takes the layout of the reference."""
    backend = find_gpu_backend().name if device == "cuda" else ""
    if backend == "cuda" and bits == 4:
        from llmquant.kernels import cuda

        return Kernels(cuda.shapes, cuda.pack, cuda.unpack, cuda.linear)
    if backend == "triton" or (backend == "cuda" and find_spec("triton")):
        from llmquant.kernels import triton

        return Kernels(triton.shapes, triton.pack, triton.unpack, triton.linear)
    return PANELS
