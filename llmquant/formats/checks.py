"""What every layout promises: nothing is lost on the way in, nothing malformed comes out."""

from collections.abc import Mapping
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
    read: Mapping[str, Tensor], specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, Tensor]:
    """The tensors of `specs` by the last part of their names; any floating-point dtype may stand for another.

    Raises:
        CheckpointError: a tensor has another shape or kind of number.
    """
    tensors = {}
    for name, (dtype, shape) in specs.items():
        tensor = read[name]
        alike = tensor.is_floating_point() if dtype.is_floating_point else tensor.dtype == dtype
        if not alike or tensor.shape != shape:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CheckpointError(f"{name}: is {found}, expected {dtype} {shape}; is config.json of this checkpoint?")
        tensors[name.rpartition(".")[2]] = tensor
    return tensors


def check_midpoint(name: str, zeros: Tensor, scheme: Scheme) -> None:
    """CheckpointError if a weight that config.json calls symmetric is not: its zero points would be lost unread."""
    if scheme.symmetric and not bool((zeros == scheme.midpoint).all()):
        value = int(zeros[zeros != scheme.midpoint][0])
        raise CheckpointError(
            f"{name}: holds zero point {value}, but config.json says symmetric ({scheme.midpoint}); "
            "is config.json of this checkpoint?"
        )


def column_order(name: str, g_idx: Tensor, n: int, scheme: Scheme) -> Tensor | None:
    """The columns of a weight sorted by their groups (act-order), int64 [n]; None where they are in place.

    Raises:
        CheckpointError: the groups are not of the same size.
    """
    in_place = group_of_column(n, scheme)
    if g_idx.shape != (n,) or g_idx.is_floating_point():
        raise CheckpointError(
            f"{name}: is {g_idx.dtype} {tuple(g_idx.shape)}, expected the group of each of {n} columns"
        )
    if torch.equal(g_idx.int(), in_place.to(g_idx.device)):
        return None
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order].int(), in_place.to(g_idx.device)):
        raise CheckpointError(f"{name}: its groups are not all of {scheme.width(n)} columns; quantize the model again")
    return order


def group_of_column(n: int, scheme: Scheme) -> Tensor:
    """int32 [n]: the group of each column, where they are in place."""
    return torch.arange(n, dtype=torch.int32) // scheme.width(n)


def check_in_place(prefix: str, order: Tensor | None, layout: str) -> None:
    """RecipeError if the columns are reordered, which most layouts have no place for."""
    if order is not None:
        raise RecipeError(
            f"{prefix}: its columns are reordered (desc_act), which {layout} cannot hold; keep it in gptq"
        )


def read_scheme(bits: Any, group_size: Any, symmetric: Any) -> Scheme:
    """A scheme from the values of a config.json. CheckpointError if they make none that can be read."""
    try:
        if not (type(bits) is type(group_size) is int and type(symmetric) is bool):
            raise RecipeError(f"bits {bits!r}, group_size {group_size!r}, symmetric {symmetric!r} make no scheme")
        return Scheme(bits, group_size, symmetric)
    except RecipeError as error:
        raise CheckpointError(f"config.json: quantization_config: {error}") from error
