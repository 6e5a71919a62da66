"""Models whose layers are not all attention: linear attention, state spaces and short convolutions between them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measuring import loaded_alike, the_same_by_our_plugin
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from llmquant.model.layout import derive_layout
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.loader import load
from llmquant.scheme import Scheme

HYBRIDS = ["qwen3_5_text", "qwen3_next", "lfm2", "granitemoehybrid", "bamba"]
GATED = {"qwen3_5_text": ("in_proj_a", "in_proj_b"), "qwen3_next": ("in_proj_ba",)}
IDS = torch.arange(3, 83).view(1, 80)  # more than a chunk of linear attention
Make = Callable[..., Path]


@pytest.mark.parametrize("arch", HYBRIDS)
def test_it_is_loaded_as_transformers_loads_it(arch: str, make_checkpoint: Make) -> None:
    assert loaded_alike(make_checkpoint(arch=arch), IDS)


@pytest.mark.parametrize("arch", GATED)
def test_gates_are_kept_and_nothing_folds_into_what_they_read(arch: str, make_checkpoint: Make) -> None:
    layout = derive_layout(AutoConfig.from_pretrained(make_checkpoint(arch=arch)))
    mixer = "model.layers.0.linear_attn."
    kept = {f"{mixer}{gate}" for gate in GATED[arch]}
    assert kept <= set(layout.kept)
    assert not kept & set(layout.linears())
    first, last = (group for group in layout.layers[0].groups if group.linears[0].startswith(mixer))
    assert len(first.linears) == len(kept)  # the other projections of the same input
    assert (first.norm, first.foldable) == ("model.layers.0.input_layernorm", False)
    assert (last.linears, last.norm) == ((f"{mixer}out_proj",), None)
    assert layout.layers[1].groups[0].foldable  # attention


@pytest.mark.parametrize("arch", HYBRIDS)
def test_all_else_is_quantized(arch: str, make_checkpoint: Make, packed: Make) -> None:
    before, after = (load_file(path / "model.safetensors") for path in (make_checkpoint(arch=arch), packed(arch)))
    ignored = json.loads((packed(arch) / "config.json").read_text())["quantization_config"]["ignore"]
    matrices = {name.removesuffix(".weight") for name in before if before[name].dim() == 2 and ".layers." in name}
    kept = {name for name in matrices if f"{name}.weight" in after}
    assert {name.rpartition(".")[2] for name in kept} <= {*GATED.get(arch, ()), "gate", "shared_expert_gate"}
    assert kept <= set(ignored)
    assert all(torch.equal(after[name], before[name]) for name in before if name in after)


@pytest.mark.parametrize("arch", HYBRIDS)
def test_transformers_computes_the_same_with_our_kernels(arch: str, packed: Make) -> None:
    assert the_same_by_our_plugin(packed(arch), IDS)


@pytest.mark.parametrize("arch", HYBRIDS)
def test_tokens_one_by_one_are_those_of_the_whole(arch: str, packed: Make) -> None:
    model = load(packed(arch), torch.float32)
    found = model.generate(IDS[:, :70], max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        expected = model(found[:, :-1]).logits[:, 69:].argmax(-1)
    assert torch.equal(found[:, 70:], expected[:, : found.shape[1] - 70])


@pytest.mark.parametrize(
    ("arch", "ahead"), [("qwen3_5_text", "mtp.layers.0.mlp.up_proj"), ("deepseek_v3", "model.layers.2.mlp.up_proj")]
)
def test_what_guesses_tokens_ahead_is_copied_and_ignored(
    arch: str, ahead: str, make_checkpoint: Make, tmp_path: Path
) -> None:
    """A part of published checkpoints that transformers does not load, and servers do; DeepSeek-V3's is a layer."""
    original, out = tmp_path / "original", tmp_path / "packed"
    shutil.copytree(make_checkpoint(arch=arch), original)
    tensors = load_file(original / "model.safetensors")
    tensors |= {f"{ahead}.weight": torch.ones(128, 64), "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    plan = quantize(original, out, Recipe(method="rtn", scheme=Scheme(4, 32)))
    module = ahead.removeprefix("model.").removesuffix(".mlp.up_proj").removesuffix(".layers.0")
    assert any(note.startswith(f"{module}: ") for note in plan.notes)
    after = load_file(out / "model.safetensors")
    assert torch.equal(after[f"{ahead}.weight"], tensors[f"{ahead}.weight"])
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert any(re.match(rule.removeprefix("re:"), ahead) for rule in ignored if "re:" in rule)
    assert not any(re.match(rule.removeprefix("re:"), "model.layers.0.mlp.up_proj") for rule in ignored)
    assert not any("rotary" in rule for rule in ignored)
