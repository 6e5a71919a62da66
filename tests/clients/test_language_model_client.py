"""transformers with the compressed-tensors package loads models that see, too, whose language model is packed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import towers
from client_checks import distance, needs
from transformers import AutoModelForImageTextToText

from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.loader import load

pytestmark = needs("compressed_tensors")

IDS = torch.arange(3, 51).view(2, 24)
RECIPES: dict[str, dict[str, Any]] = {
    "one scheme": {},
    "two schemes, one kept": {
        "overrides": [
            {"match": r"re:.*\.self_attn\.(q|q_a|k|v|kv_a|gate)_proj(_with_mqa)?", "bits": 8},
            {"match": "model.layers.1.self_attn.o_proj", "skip": True},
        ]
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("arch", [arch for arch in towers.FAMILIES if arch not in towers.LONELY])
def test_it_is_read_as_we_read_it(arch: str, recipe: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    original = towers.make(arch, tiny_checkpoint, tmp_path / "original")
    told = {"method": "rtn", "scheme": {"group_size": 32}, **RECIPES[recipe]}
    quantize(original, tmp_path / "packed", Recipe.from_dict(told))
    before = AutoModelForImageTextToText.from_pretrained(original, dtype=torch.float32).eval()
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    ours = load(tmp_path / "packed", torch.float32)
    with torch.inference_mode():
        found, expected, unpacked = (model(input_ids=IDS).logits for model in (theirs, ours, before))
    assert distance(found, expected) < 0.02 * distance(unpacked, expected)
    after = dict(theirs.named_parameters())
    beside = [name for name, _ in before.named_parameters() if "vis" in name]
    assert len(beside) > 10
    assert all(torch.equal(after[name], before.get_parameter(name)) for name in beside)


@pytest.mark.parametrize("arch", towers.LONELY)
def test_experts_that_it_does_not_find_are_said_to_be_random(arch: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """If it has learned to find them, the plan need not warn of it any more."""
    original = towers.make(arch, tiny_checkpoint, tmp_path / "original")
    plan = quantize(original, tmp_path / "packed", Recipe.from_dict({"method": "rtn", "scheme": {"group_size": 32}}))
    assert any("leaves these experts random" in note for note in plan.notes)
    told: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "packed", **told)
    assert {name.rpartition(".")[2] for name in info["missing_keys"]} == {"gate_up_proj", "down_proj"}
