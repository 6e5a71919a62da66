"""Families that are like no other in some way, the whole way: loaded, quantized and loaded again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measuring import compared
from runs import packer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmquant.model.layout import derive_layout
from llmquant.pipeline import preview
from llmquant.recipe import Recipe
from llmquant.runtime.linear import QuantLinear
from llmquant.runtime.loader import load
from llmquant.runtime.transformers_plugin import LlmquantConfig

KEPT = {  # linears of decoder layers that are not packed, beside routers
    "deepseek_v32": {"wk", "weights_proj"},  # DeepSeek's sparse attention: what chooses tokens
    "glm_moe_dsa": {"wk", "weights_proj"},
    "jamba": {"dt_proj"},  # whose weight the state space multiplies by itself
    "gemma3n_text": {"prediction_coefs", "correction_coefs", "modality_router"},  # four hidden states, mixed twice
}
ROUTERS = {"gate", "router"}
IDS = torch.randint(3, 512, (2, 48), generator=torch.Generator().manual_seed(1))
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def packed(make_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return packer(lambda arch: make_checkpoint(arch=arch), tmp_path_factory)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("arch", KEPT)
def test_it_is_loaded_as_transformers_loads_it(arch: str, make_checkpoint: Make) -> None:
    """With more tokens than sparse attention chooses."""
    original = make_checkpoint(arch=arch)
    theirs = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    assert torch.allclose(logits(load(original, torch.float32)), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", KEPT)
def test_it_is_quantized_but_for_what_cannot_be(arch: str, make_checkpoint: Make, packed: Make) -> None:
    original, ours = (load(path, torch.float32) for path in (make_checkpoint(arch=arch), packed(arch)))
    assert 0 < compared(ours, original, IDS).divergence.mean_kl < 0.4
    kept = {
        name
        for name, module in ours.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name and name.rpartition(".")[2] not in ROUTERS
    }
    assert {name.rpartition(".")[2] for name in kept} == KEPT[arch]
    ignored = json.loads((packed(arch) / "config.json").read_text())["quantization_config"]["ignore"]
    assert kept <= set(ignored)


@pytest.mark.parametrize("arch", ["jamba", "gemma3n_text"])  # sparse attention chooses among equals, in any order
def test_token_by_token_it_writes_what_it_writes_at_once(arch: str, packed: Make) -> None:
    model = load(packed(arch), torch.float32)
    ids = IDS[:1, :24]
    written = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with torch.inference_mode():
        whole = model(written, use_cache=False).logits
    assert torch.equal(whole[0, 23:-1].argmax(-1), written[0, 24:])


@pytest.mark.parametrize("arch", KEPT)
def test_transformers_computes_the_same_with_our_kernels(arch: str, packed: Make) -> None:
    told = {"quantization_config": LlmquantConfig(), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(packed(arch), **told).eval()
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) >= 10
    assert torch.equal(logits(model), logits(load(packed(arch), torch.float32)))


def test_what_no_linear_owns_is_said(make_checkpoint: Make) -> None:
    model = make_checkpoint(arch="jamba")
    assert "model.layers.0.mamba.A_log" in derive_layout(AutoConfig.from_pretrained(model)).strays
    notes = preview(model, Recipe.from_dict({"method": "rtn", "scheme": {"group_size": 32}})).notes
    assert "mamba.A_log, mamba.conv1d.weight in 1 layers: no linear's, kept" in notes


def test_a_linear_of_a_few_columns_is_kept(make_checkpoint: Make) -> None:
    notes = preview(make_checkpoint(arch="gemma3n_text"), Recipe.from_dict({"scheme": {"group_size": -1}})).notes
    coefficients = "altup.prediction_coefs, altup.correction_coefs"
    assert f"{coefficients} in 2 layers: kept: 4 columns are less than any group" in notes
