"""ONNX graphs: well-formed, with every integer in the file beside them; or a refusal."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmquant.checkpoint.reader import Checkpoint
from llmquant.convert import convert
from llmquant.convert.source import Source
from llmquant.errors import ArchitectureError, CheckpointError
from llmquant.formats import onnx as operands
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.scheme import Scheme
from llmquant.verify import verify_checkpoint

onnx = pytest.importorskip("onnx")


@pytest.mark.parametrize(("arch", "tied"), [("llama", 1), ("qwen2", 0), ("qwen3", 0)])
def test_the_graph_is_well_formed_and_holds_the_integers(
    make_checkpoint: Callable[..., Path], tmp_path: Path, arch: str, tied: int
) -> None:
    scheme = Scheme(4, 32, symmetric=False)
    quantize(make_checkpoint(arch=arch, tied=tied), tmp_path / "packed", Recipe(method="rtn", scheme=scheme))
    convert(tmp_path / "packed", tmp_path / "onnx", "onnx")
    onnx.checker.check_model(tmp_path / "onnx" / "model.onnx")
    assert verify_checkpoint(tmp_path / "onnx") > 4
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulNBits") == 14
    assert kinds.count("GroupQueryAttention") == 2
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    source = Source.open(tmp_path / "packed")
    for name in source.schemes:
        for leaf, value in operands.pack(source.read(name), scheme).items():
            found = torch.from_numpy(onnx.numpy_helper.to_array(tensors[f"{name}.{leaf}"]).copy())
            assert torch.equal(found, value), f"{name}.{leaf}"
    assert ("lm_head.weight" in tensors) is not bool(tied)


def test_the_same_checkpoint_gives_the_same_bytes(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    quantize(make_checkpoint(), tmp_path / "packed", Recipe(method="rtn", scheme=Scheme(4, 32)))
    sums = []
    for name in ("one", "two"):
        convert(tmp_path / "packed", tmp_path / name, "onnx")
        sums.append((tmp_path / name / "SHA256SUMS").read_bytes())
    assert sums[0] == sums[1]


def test_other_families_are_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    quantize(make_checkpoint(arch="gemma2"), tmp_path / "packed", Recipe(method="rtn", scheme=Scheme(4, 32)))
    with pytest.raises(ArchitectureError, match="gemma2: is not written as ONNX"):
        convert(tmp_path / "packed", tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_no_loader_takes_the_directory_for_a_checkpoint(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    quantize(make_checkpoint(), tmp_path / "packed", Recipe(method="rtn", scheme=Scheme(4, 32)))
    convert(tmp_path / "packed", tmp_path / "onnx", "onnx")
    with pytest.raises(CheckpointError, match=r"model\.onnx is in a format that is not read"):
        Checkpoint.open(tmp_path / "onnx")
