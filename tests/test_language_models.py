"""Checkpoints that see, too: their language model is quantized, and all else is left as it is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import towers
from measuring import compared
from runs import packer, recipe, write_ids
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from llmquant.card import model_card
from llmquant.convert import convert
from llmquant.errors import ArchitectureError, RecipeError
from llmquant.inspect import inspect_checkpoint
from llmquant.pipeline import preview, quantize
from llmquant.recipe import Recipe
from llmquant.runtime.generate import generate
from llmquant.runtime.linear import QuantLinear
from llmquant.runtime.loader import load
from llmquant.runtime.transformers_plugin import LlmquantConfig
from llmquant.verify import verify_checkpoint

IDS = torch.arange(3, 51).view(2, 24)
OVERRIDES = [
    {"match": r"re:.*\.self_attn\.(q|q_a|k|v|kv_a|gate)_proj(_with_mqa)?", "bits": 8},
    {"match": "model.layers.1.self_attn.o_proj", "skip": True},
]
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def original(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            made[arch] = towers.make(arch, tiny_checkpoint, tmp_path_factory.mktemp(arch) / "original")
        return made[arch]

    return make


@pytest.fixture(scope="module")
def packed(original: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return packer(original, tmp_path_factory, overrides=OVERRIDES)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def with_towers(directory: Path) -> PreTrainedModel:
    told = {"quantization_config": LlmquantConfig(), "dtype": torch.float32}
    return AutoModelForImageTextToText.from_pretrained(directory, **told).eval()


@pytest.mark.parametrize("arch", towers.FAMILIES)
def test_for_text_alone_the_language_model_is_the_whole_one(arch: str, original: Make) -> None:
    whole = AutoModelForImageTextToText.from_pretrained(original(arch), dtype=torch.float32).eval()
    ours = load(original(arch), torch.float32)
    assert torch.allclose(logits(ours), logits(whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", towers.FAMILIES)
def test_what_is_not_of_the_language_model_is_copied(arch: str, original: Make, packed: Make) -> None:
    before, after = (load_file(make(arch) / "model.safetensors") for make in (original, packed))
    beside = [name for name in before if any(part in name for part in ("vis", "projector", "connector"))]
    assert len(beside) > 10
    assert all(torch.equal(after[name], before[name]) for name in beside)
    leaves = ("_proj.weight", ".wo.weight", ".wkv_b.weight", ".w1.weight", ".w2.weight")
    linears = [name for name in before if "layers." in name and name.endswith(leaves) and name not in beside]
    (kept,) = (name for name in linears if name in after and "indexer" not in name)
    assert kept.endswith(("layers.1.self_attn.o_proj.weight", "layers.1.attention.wo.weight"))
    verify_checkpoint(packed(arch))


@pytest.mark.parametrize("arch", towers.FAMILIES)
def test_transformers_has_the_same_language_model_with_our_kernels(arch: str, original: Make, packed: Make) -> None:
    """Two schemes and a linear that is kept: config.json names them wherever they are. Towers are as they were."""
    whole = AutoModelForImageTextToText.from_pretrained(original(arch), dtype=torch.float32)
    model, ours = with_towers(packed(arch)), load(packed(arch), torch.float32)
    count = sum(isinstance(module, QuantLinear) for module in ours.modules())
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == count > 10
    assert torch.equal(logits(model), logits(ours))
    beside = {name: tensor for name, tensor in whole.named_parameters() if "vis" in name}
    assert len(beside) > 10
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in beside.items())


@pytest.mark.parametrize("arch", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_of_a_model_that_talks_the_thinker_is_quantized(arch: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    thinker = towers.make_omni(arch, tiny_checkpoint, tmp_path / "original")
    ours = load(tmp_path / "original", torch.float32)
    assert torch.allclose(logits(ours), logits(thinker), rtol=1e-4, atol=1e-4)
    calibration = write_ids(tmp_path / "ids.jsonl", 12, 48)
    quantize(tmp_path / "original", tmp_path / "packed", recipe(calibration))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("original", "packed"))
    linears = {name for name in before if name not in after}
    assert len(linears) >= 14
    assert all(name.startswith("thinker.model.layers.") for name in linears)
    assert all(torch.equal(after[name], before[name]) for name in before if name not in linears)
    block = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert {rf"re:.*{tower}(\..*)?$" for tower in ("audio_tower", "visual", "talker")} <= {*block["ignore"]}
    assert compared(load(tmp_path / "packed", torch.float32), ours, IDS).divergence.mean_kl < 0.2


@pytest.mark.parametrize("arch", ["llava", "gemma3"])
def test_images_are_seen(arch: str, original: Make, packed: Make) -> None:
    model = with_towers(packed(arch))
    whole = AutoModelForImageTextToText.from_pretrained(original(arch), dtype=torch.float32).eval()
    seen = towers.picture()
    blank = seen | {"pixel_values": torch.zeros_like(seen["pixel_values"])}
    with torch.inference_mode():
        expected, found, other = (m(**x).logits for m, x in ((whole, seen), (model, seen), (model, blank)))
    assert (found - expected).norm() < 0.3 * expected.norm()
    assert (found - expected).norm() < 0.7 * (other - expected).norm()


def test_the_commands_know_the_language_model(packed: Make) -> None:
    facts = inspect_checkpoint(packed("mistral3"))
    assert (facts["architecture"], facts["layers"], facts["quantized_linears"]) == (
        "Mistral3ForConditionalGeneration",
        2,
        13,
    )
    assert generate(packed("mistral3"), "Hello", max_new_tokens=3).new_tokens == 3


def test_the_plan_says_what_is_copied(original: Make) -> None:
    plan = preview(original("llava"), Recipe(method="rtn"))
    assert any("vision_tower" in note and "copied" in note for note in plan.notes)


def test_the_plan_says_whose_experts_transformers_does_not_find(original: Make) -> None:
    said = {
        arch: any("experts random" in note for note in preview(original(arch), Recipe(method="rtn")).notes)
        for arch in ("qwen3_5_moe", *towers.LONELY)
    }
    assert said == {"qwen3_5_moe": False} | dict.fromkeys(towers.LONELY, True)


def test_the_card_says_that_it_sees(packed: Make) -> None:
    assert "pipeline_tag: image-text-to-text" in model_card(packed("llava"), "someone/llava-int4")


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_layouts_that_nobody_has_loaded_are_refused(form: str, original: Make) -> None:
    options = {"method": "rtn", "format": form, "scheme": {"symmetric": form == "gptq"}}
    with pytest.raises(RecipeError, match="more than its language model"):
        preview(original("llava"), Recipe.from_dict(options))


def test_it_is_not_converted(packed: Make, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="more than its language model"):
        convert(packed("llava"), tmp_path / "out", "gguf")
