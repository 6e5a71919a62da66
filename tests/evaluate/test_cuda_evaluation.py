"""Evaluation on a GPU: the figures of the CPU, whether a model is there as a whole or layer by layer."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmquant.evaluate.protocol import Request
from llmquant.evaluate.run import evaluate
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.layered import Layered
from llmquant.runtime.loader import load
from llmquant.scheme import Scheme

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    quantize(tiny_checkpoint, out, Recipe(method="rtn", scheme=Scheme(4, 32)))
    return out


def test_figures_are_those_of_the_cpu(packed: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    asked: dict[str, Any] = {"text_file": tmp_path / "text.txt", "request": Request(seq_len=32)}
    expected = evaluate(packed, baseline=tiny_checkpoint, **asked)
    found = evaluate(packed, baseline=tiny_checkpoint, device="cuda", **asked)
    assert found.perplexity.value == pytest.approx(expected.perplexity.value, rel=1e-3)
    assert found.divergence
    assert expected.divergence
    assert found.divergence.mean_kl == pytest.approx(expected.divergence.mean_kl, rel=1e-2)


def test_layer_by_layer_gives_the_same_bits(packed: Path) -> None:
    windows = [torch.arange(start, start + 24) for start in (0, 30)]
    with torch.inference_mode():
        whole = load(packed, torch.float32, device="cuda")
        expected = [whole(ids[None].cuda()).logits[0] for ids in windows]
    for logits, other in zip(Layered(packed, torch.float32, device="cuda").logits(windows), expected, strict=True):
        assert logits.is_cuda
        assert torch.equal(logits, other)
