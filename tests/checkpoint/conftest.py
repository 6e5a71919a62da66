"""A tiny checkpoint on disk, and shards put together byte by byte."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import llmquant.errors


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(16, 8).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(12, 8).bfloat16(),
        "model.layers.1.mlp.up_proj.weight": torch.randn(12, 8).bfloat16(),
        "model.norm.weight": torch.ones(8),
    }


@pytest.fixture
def single(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    """A model in one file."""
    root = tmp_path / "model"
    root.mkdir()
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    (root / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    (root / "tokenizer.json").write_text("{}")
    return root


@pytest.fixture
def sharded(single: Path, tensors: dict[str, Tensor]) -> Path:
    """The same model in two shards with an index."""
    (single / "model.safetensors").unlink()
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, single / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (single / "model.safetensors.index.json").write_text(json.dumps(index))
    return single


@pytest.fixture
def shard_bytes() -> Callable[[Any, bytes], bytes]:
    """A file of the safetensors form with any header (an object, or the text of one) and any data."""

    def build(header: Any, data: bytes) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data

    return build


@pytest.fixture
def run_child() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a process of its own."""

    def run(code: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *map(str, args)]
        home = Path(llmquant.errors.__file__).parents[1]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=home, check=False)

    return run
