"""Experts that lie in one tensor for a layer are read as if they lay one by one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from towers import stack_experts

from llmquant.checkpoint.reader import Checkpoint
from llmquant.checkpoint.stacked import MOST
from llmquant.errors import CheckpointError
from llmquant.model.shell import Shell

E, INNER, HIDDEN = 3, 5, 7
BLOCK = "model.layers.0.mlp.experts"
Make = Callable[..., Path]


@pytest.fixture
def stacked(make_checkpoint: Make, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint with these tensors beside its own."""

    def make(tensors: dict[str, Tensor]) -> Path:
        directory = Path(shutil.copytree(make_checkpoint(), tmp_path / "model"))
        save_file(load_file(directory / "model.safetensors") | tensors, directory / "model.safetensors")
        return directory

    return make


def stacks(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(E, 2 * INNER, HIDDEN, generator=generator).to(dtype)
    down = torch.randn(E, HIDDEN, INNER, generator=generator).to(dtype)
    return {f"{BLOCK}.gate_up_proj": gate_up, f"{BLOCK}.down_proj": down}


def turned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.transpose(1, 2).contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("how", [dict, turned], ids=["as linears", "turned"])
def test_each_matrix_is_read(
    how: Callable[[dict[str, Tensor]], dict[str, Tensor]], dtype: torch.dtype, stacked: Callable[..., Path]
) -> None:
    tensors = stacks(dtype)
    source = Checkpoint.open(stacked(how(tensors)))
    gate_up, down = tensors.values()
    for expert in range(E):
        expected = {"gate_proj": gate_up[expert][:INNER], "up_proj": gate_up[expert][INNER:], "down_proj": down[expert]}
        for kind, matrix in expected.items():
            name = f"{BLOCK}.{expert}.{kind}.weight"
            assert torch.equal(source.read(name), matrix)
            assert source.read(name).is_contiguous()
            lazy = source.lazy(name)
            assert (lazy.dtype, lazy.shape, source.tensors[name].nbytes) == (dtype, matrix.shape, matrix.nbytes)
            found = torch.frombuffer(bytearray(b"".join(lazy.read())), dtype=dtype).view(matrix.shape)
            assert torch.equal(found, matrix)
    assert not {*tensors} & {*source.tensors}


def broken(tensors: dict[str, Tensor], **changes: Tensor) -> dict[str, Tensor]:
    return tensors | {f"{BLOCK}.{name}": tensor for name, tensor in changes.items()}


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{BLOCK}.gate_up_proj": torch.zeros(E, 2 * INNER, HIDDEN)},  # by itself
        broken(stacks(), gate_up_proj=torch.zeros(E, 2 * INNER + 1, HIDDEN)),
        broken(stacks(), down_proj=torch.zeros(E + 1, HIDDEN, INNER)),
        broken(stacks(), down_proj=torch.zeros(E, HIDDEN)),
        broken(stacks(), gate_up_proj=torch.zeros(E, 2 * INNER, HIDDEN, dtype=torch.uint8)),
        broken(stacks(), gate_up_proj=torch.zeros(0, 2 * INNER, HIDDEN), down_proj=torch.zeros(0, HIDDEN, INNER)),
        broken(stacks(), gate_up_proj=torch.zeros(MOST + 1, 2, 1), down_proj=torch.zeros(MOST + 1, 1, 1)),
    ],
    ids=["no other", "odd rows", "other experts", "a matrix", "codes", "none", "too many"],
)
def test_what_is_something_else_is_left_as_it_is(tensors: dict[str, Tensor], stacked: Callable[..., Path]) -> None:
    source = Checkpoint.open(stacked(tensors))
    assert {*tensors} <= {*source.tensors}
    assert not any(name.endswith(".0.down_proj.weight") and BLOCK in name for name in source.tensors)


def test_a_matrix_that_is_there_twice_is_refused(stacked: Callable[..., Path]) -> None:
    twice = stacks() | {f"{BLOCK}.1.up_proj.weight": torch.zeros(INNER, HIDDEN)}
    with pytest.raises(
        CheckpointError, match=r"experts\.1\.up_proj\.weight: is also a part of .*experts\.gate_up_proj"
    ):
        Checkpoint.open(stacked(twice))


def test_other_stacks_of_experts_are_refused_by_name(make_checkpoint: Make, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(make_checkpoint(arch="qwen3_moe"), tmp_path / "model"))
    stack_experts(directory)
    tensors = load_file(directory / "model.safetensors")
    codes = {
        name: tensor.to(torch.float8_e4m3fn) if ".experts." in name else tensor for name, tensor in tensors.items()
    }
    save_file(codes, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="holds all experts of a layer in one tensor"):
        Shell(Checkpoint.open(directory))
