"""Checkpoints that are published in FP8 are those that they mean, in bf16; what else is in FP8 is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquant.checkpoint.block_scaled import unscaled
from llmquant.checkpoint.reader import INDEX, Checkpoint
from llmquant.convert import convert
from llmquant.errors import CheckpointError, NumericsError
from llmquant.inspect import inspect_checkpoint
from llmquant.manifest import MANIFEST
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.loader import load

BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 64]}
SHAPE = {"hidden": 192, "intermediate": 320, "heads": 4}  # no whole blocks
MakeCheckpoint = Callable[..., Path]


def scaled(weight: Tensor, rows: int = 128, columns: int = 64) -> tuple[Tensor, Tensor]:
    """As DeepSeek's own conversion: the largest number of a block becomes 448."""
    m, n = weight.shape
    scales = torch.empty(-(-m // rows), -(-n // columns))
    codes = torch.empty(m, n, dtype=torch.float8_e4m3fn)
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


@pytest.fixture
def published(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> tuple[Path, Path]:
    """A mixture in FP8, with the scales in a shard of their own, and the same in bf16."""
    original = make_checkpoint(arch="qwen3_moe", **SHAPE)
    fp8, bf16 = (Path(shutil.copytree(original, tmp_path / name / "model")) for name in ("fp8", "bf16"))
    tensors, scales = load_file(original / "model.safetensors"), dict[str, Tensor]()
    meant = dict(tensors)
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensors[name], scales[f"{name}_scale_inv"] = scaled(tensor)
            rows = scales[f"{name}_scale_inv"].repeat_interleave(128, 0)[: len(tensor)]
            every = rows.repeat_interleave(64, 1)[:, : tensor.shape[1]]
            meant[name] = (tensors[name].float() * every).bfloat16()
    save_file(meant, bf16 / "model.safetensors", {"format": "pt"})
    (fp8 / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": scales}
    for file, part in files.items():
        save_file(part, fp8 / file, {"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    (fp8 / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    edit(fp8, quantization_config=BLOCK)
    return fp8, bf16


def edit(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def test_what_is_listed_and_read_is_what_is_meant(published: tuple[Path, Path]) -> None:
    fp8, bf16 = map(Checkpoint.open, published)
    assert fp8.config == bf16.config
    assert {name: (info.dtype, info.shape) for name, info in fp8.tensors.items()} == {
        name: (info.dtype, info.shape) for name, info in bf16.tensors.items()
    }
    for name in bf16.tensors:
        assert torch.equal(fp8.read(name), bf16.read(name)), name
        pieces = b"".join(map(bytes, fp8.lazy(name).read()))
        assert pieces == b"".join(map(bytes, bf16.lazy(name).read()))


def test_quantizing_it_is_quantizing_what_it_means(published: tuple[Path, Path]) -> None:
    recipe = Recipe.from_dict({"scheme": {"group_size": 64}, "calibration": {"samples": 6, "seq_len": 48}})
    for directory in published:
        quantize(directory, directory.parent / "out", recipe)
    manifests = [(directory.parent / "out" / MANIFEST).read_bytes() for directory in published]
    assert manifests[0] == manifests[1]


def test_it_is_loaded_and_converted_as_what_it_means(published: tuple[Path, Path]) -> None:
    pytest.importorskip("gguf")
    ids = torch.arange(3, 51).view(2, 24)
    with torch.inference_mode():
        logits = [load(directory, torch.float32)(ids).logits for directory in published]
    assert torch.equal(*logits)
    for directory in published:
        convert(directory, directory.parent / "gguf", "gguf")
    files = [(directory.parent / "gguf" / "model.gguf").read_bytes() for directory in published]
    assert files[0] == files[1]


def test_inspect_counts_bits_of_the_file(published: tuple[Path, Path]) -> None:
    fp8, bf16 = map(inspect_checkpoint, published)
    assert fp8["quantization"] is None
    assert 8 < fp8["bits_per_weight"] < bf16["bits_per_weight"] == 16.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_block_size": None}, r"is quantized already \(fp8\)"),
        ({"fmt": "e5m2"}, r"is quantized already \(fp8\)"),
        ({"weight_block_size": [64, 64]}, r"_scale_inv: is torch\.float32 .* in blocks of \(64, 64\) has fp32"),
    ],
)
def test_other_fp8_is_refused(
    published: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    edit(published[0], quantization_config=BLOCK | change)
    with pytest.raises(CheckpointError, match=message):
        quantize(published[0], tmp_path / "out", Recipe(method="rtn"))
    assert not (tmp_path / "out").exists()


def test_a_weight_without_scales_is_refused(published: tuple[Path, Path], tmp_path: Path) -> None:
    file = published[0] / "model-00002-of-00002.safetensors"
    scales, name = load_file(file), "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    del scales[name]
    save_file(scales, file, {"format": "pt"})
    index = json.loads((published[0] / INDEX).read_text())
    del index["weight_map"][name]
    (published[0] / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight: is stored as torch\.float8_e4m3fn"):
        quantize(published[0], tmp_path / "out", Recipe(method="rtn"))


def test_a_scale_that_is_not_finite_is_refused(published: tuple[Path, Path], tmp_path: Path) -> None:
    file = published[0] / "model-00002-of-00002.safetensors"
    scales = load_file(file)
    scales["model.layers.1.self_attn.q_proj.weight_scale_inv"][1, 2] = float("inf")
    save_file(scales, file, {"format": "pt"})
    with pytest.raises(NumericsError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
        quantize(published[0], tmp_path / "out", Recipe(method="rtn"))


@pytest.mark.parametrize("shape", [(1, 1), (128, 64), (129, 65), (300, 40)])
def test_blocks_at_the_edges(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scales = scaled(weight)
    found = unscaled(codes, scales, (128, 64))
    assert found.dtype == torch.bfloat16
    assert float((found.float() - weight).abs().max() / weight.abs().max()) < 0.07
    for i, row in enumerate(found):
        for j in range(shape[1]):
            exact = float(codes[i, j]) * float(scales[i // 128, j // 64])
            assert float(row[j]) == pytest.approx(exact, rel=2**-8)
