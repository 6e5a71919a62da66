"""What every layout promises: nothing is lost on the way in, nothing malformed comes out."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import CheckpointError, NumericsError, RecipeError
from llmquant.scheme import Scheme


def stored_scales(name: str, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype of the file. NumericsError if one changes by that: the codes were chosen for its value."""
    stored = scales.to(dtype)
    if not torch.equal(stored.float(), scales):
        index = torch.nonzero(stored.float() != scales)[0].tolist()
        value = float(scales[tuple(index)])
        raise NumericsError(f"{name}: scale {value!r} at {index} is not exact in {dtype}; round it before solving")
    return stored.contiguous()


def read_checked(
    read: Callable[[str], Tensor], specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, Tensor]:
    """The tensors of `specs` by the last part of their names; any floating-point dtype may stand for another.

    Raises:
        CheckpointError: a tensor has another shape or kind of number.
    """
    tensors = {}
    for name, (dtype, shape) in specs.items():
        tensor = read(name)
        alike = tensor.is_floating_point() if dtype.is_floating_point else tensor.dtype == dtype
        if not alike or tensor.shape != shape:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CheckpointError(f"{name}: is {found}, expected {dtype} {shape}; is config.json of this checkpoint?")
        tensors[name.rpartition(".")[2]] = tensor
    return tensors


def read_scheme(bits: Any, group_size: Any, symmetric: Any) -> Scheme:
    """A scheme from the values of a config.json. CheckpointError if they make none that can be read."""
    try:
        if not (type(bits) is type(group_size) is int and type(symmetric) is bool):
            raise RecipeError(f"bits {bits!r}, group_size {group_size!r}, symmetric {symmetric!r} make no scheme")
        return Scheme(bits, group_size, symmetric)
    except RecipeError as error:
        raise CheckpointError(f"config.json: quantization_config: {error}") from error
