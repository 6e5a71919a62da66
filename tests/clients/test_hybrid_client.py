"""transformers with the compressed-tensors package loads models whose layers are not all attention."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from client_checks import distance, needs
from transformers import AutoModelForCausalLM

from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.loader import load
from llmquant.scheme import Scheme

pytestmark = needs("compressed_tensors")

IDS = torch.arange(3, 83).view(1, 80)


@pytest.mark.parametrize("arch", ["qwen3_5_text", "lfm2", "granitemoehybrid", "bamba"])
def test_it_is_read_as_we_read_it(arch: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    quantize(make_checkpoint(arch=arch), tmp_path / "packed", Recipe(method="rtn", scheme=Scheme(4, 32)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    ours = load(tmp_path / "packed", torch.float32)
    with torch.inference_mode():
        found, expected = (model(input_ids=IDS).logits for model in (theirs, ours))
    assert distance(found, expected) < 5e-3
