"""Layer by layer gives what the whole model gives, bit for bit, in every family, packed or not."""

from pathlib import Path

import pytest
import torch

from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.runtime import layered
from llmquant.runtime.layered import Layered
from llmquant.runtime.loader import load

RTN = Recipe.from_dict({"method": "rtn", "scheme": {"group_size": 32}})
IDS = [torch.randint(3, 512, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 17, 40)]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt_neox", "mixtral", "qwen3_moe"]


def whole(directory: Path) -> list[torch.Tensor]:
    model = load(directory, torch.float32)
    with torch.no_grad():
        return [model(input_ids=ids[None], use_cache=False).logits[0] for ids in IDS]


def same(directory: Path, at_once: int | None = None) -> bool:
    found = Layered(directory, torch.float32, at_once).logits(IDS)
    return all(torch.equal(a, b) for a, b in zip(found, whole(directory), strict=True))


@pytest.mark.parametrize("arch", FAMILIES)
def test_original(make_checkpoint, arch: str):
    assert same(make_checkpoint(arch=arch))


@pytest.mark.parametrize("arch", ["llama", "gemma2", "opt", "phi3", "deepseek_v3"])
def test_packed(make_checkpoint, tmp_path: Path, arch: str):
    quantize(make_checkpoint(arch=arch, tied=1), tmp_path / "out", RTN)
    assert same(tmp_path / "out")


@pytest.mark.parametrize("at_once", [1, 2])
def test_in_parts(tiny_checkpoint, at_once: int):
    assert same(tiny_checkpoint, at_once)


def test_no_layer_stays_in_memory(tiny_checkpoint, monkeypatch):
    """While the logits are made, all parameters inside of layers are on the meta device."""
    made = []

    class Filling(layered.Filling):
        def __init__(self, *arguments: object, **named: object) -> None:
            super().__init__(*arguments, **named)
            made.append(self.model)

    monkeypatch.setattr(layered, "Filling", Filling)
    next(Layered(tiny_checkpoint, torch.float32).logits(IDS))
    devices = {name: parameter.device.type for name, parameter in made[0].named_parameters()}
    assert {device for name, device in devices.items() if ".layers." in name} == {"meta"}
    assert devices["model.norm.weight"] == "cpu"


@pytest.mark.parametrize("at_once", [None, 2])
def test_parts_of_the_work_add_up(tiny_checkpoint, at_once: int | None):
    parts: list[float] = []
    list(Layered(tiny_checkpoint, torch.float32, at_once, parts.append).logits(IDS))
    assert sum(parts) == pytest.approx(1)
