"""A ModelOpt checkpoint: its files, and a refusal of what it cannot hold."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmquant.convert import convert
from llmquant.errors import RecipeError
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.scheme import Scheme
from llmquant.verify import verify_checkpoint


def test_files(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    quantize(make_checkpoint(), tmp_path / "packed", Recipe(method="rtn", scheme=Scheme(4, 64)))
    made = convert(tmp_path / "packed", tmp_path / "out", "modelopt")
    assert made.notes == ("written by TensorRT-LLM's definition of the layout, and never loaded in it by us",)
    assert verify_checkpoint(tmp_path / "out") > 4
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["exclude_modules"] == ["lm_head"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(tmp_path / "packed" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert tensors[f"{name}.weight"].dtype == torch.uint8
    assert tensors[f"{name}.weight"].shape == (32, 128)
    assert torch.equal(tensors[f"{name}.weight_scale"], before[f"{name}.weight_scale"])
    assert torch.equal(tensors["model.norm.weight"], before["model.norm.weight"])


def test_refusal(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    quantize(make_checkpoint(), tmp_path / "packed", Recipe(method="rtn", scheme=Scheme(4, 32)))
    with pytest.raises(RecipeError, match=r"q_proj: modelopt cannot hold it: its groups are of 64 or 128"):
        convert(tmp_path / "packed", tmp_path / "out", "modelopt")
    assert not (tmp_path / "out").exists()
