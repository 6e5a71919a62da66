"""Families that are like no other in some way, the whole way: loaded, quantized and loaded again."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measuring import compared, loaded_alike, logits, the_same_by_our_plugin
from runs import StopAfter, recipe, relist, write_ids
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from llmquant.calibration.batches import Batch
from llmquant.calibration.crossing import Crossing
from llmquant.calibration.stream import Stream
from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import CheckpointError, VerifyError
from llmquant.model.layout import derive_layout
from llmquant.model.shell import Shell
from llmquant.pipeline import preview, quantize, sense
from llmquant.recipe import Recipe
from llmquant.runtime.layered import Layered
from llmquant.runtime.loader import load
from llmquant.verify import verify_checkpoint

KEPT = {  # linears of decoder layers that are not packed, beside routers
    "deepseek_v32": {"wk", "weights_proj"},  # DeepSeek's sparse attention: what chooses tokens
    "glm_moe_dsa": {"wk", "weights_proj"},
    "hy_v4": {"wk", "weights_proj"},  # and four hidden states for a token
    "deepseek_v4": {"kv_proj", "gate_proj", "weights_proj", "o_a_proj"},
    "olmo_hybrid": {"a_proj", "b_proj"},  # gates, beside a convolution that transformers puts together from three
    "kimi_linear": set(),
    "nanochat": set(),  # initializes the weights of what it holds
    "jamba": {"dt_proj"},  # whose weight the state space multiplies by itself
    "gemma4_text": set(),
    "gemma3n_text": {"prediction_coefs", "correction_coefs", "modality_router"},  # four hidden states, mixed twice
}
CHOOSING = ["deepseek_v32", "glm_moe_dsa", "hy_v4", "deepseek_v4"]  # tokens, among equals in any order
ROUTERS = {"gate", "router"}
IDS = torch.randint(3, 512, (2, 48), generator=torch.Generator().manual_seed(1))
Make = Callable[..., Path]


@pytest.mark.parametrize("arch", KEPT)
def test_it_is_loaded_as_transformers_loads_it(arch: str, make_checkpoint: Make) -> None:
    """With more tokens than sparse attention chooses."""
    assert loaded_alike(make_checkpoint(arch=arch), IDS)


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


@pytest.mark.parametrize("arch", sorted({*KEPT} - {*CHOOSING}))
def test_token_by_token_it_writes_what_it_writes_at_once(arch: str, packed: Make) -> None:
    model = load(packed(arch), torch.float32)
    ids = IDS[:1, :24]
    written = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with torch.inference_mode():
        whole = model(written, use_cache=False).logits[0, 23:-1]
        whole[:, model.config.eos_token_id] = -torch.inf  # which the least of new tokens rules out
    assert torch.equal(whole.argmax(-1), written[0, 24:])


@pytest.mark.parametrize("arch", KEPT)
def test_transformers_computes_the_same_with_our_kernels(arch: str, packed: Make) -> None:
    assert the_same_by_our_plugin(packed(arch), IDS)


@pytest.mark.parametrize("arch", ["gemma3n_text", "gemma4_text", "glm_moe_dsa", "hy_v4", "deepseek_v4"])
def test_layer_by_layer_a_batch_finds_what_layers_left_for_it(arch: str, make_checkpoint: Make) -> None:
    """Keys and values of an earlier layer, and the tokens that it chose: not those of another batch."""
    source = Checkpoint.open(make_checkpoint(arch=arch))
    shell = Shell(source)
    layers = derive_layout(shell.config).layers
    batches = tuple(Batch(ids[None], torch.ones(1, 48).bool()) for ids in IDS)
    stream = Stream(shell, layers, batches, compared=True)
    for layer in layers:
        with shell.filled(shell.part(layer.name)), Crossing(stream, layer) as crossing:
            crossing.advance()
    whole = load(source.root, torch.float32)
    last: list[Tensor] = []
    whole.get_submodule(layers[-1].name).register_forward_hook(lambda _, __, out: last.append(out))
    expected = logits(whole, IDS)
    out = last[0][0] if layers[-1].returned else last[0]
    for i, states in enumerate(stream.hidden):
        wanted = out[:, i : i + 1] if arch == "gemma3n_text" else out[i : i + 1]
        assert torch.allclose(states, wanted, rtol=1e-4, atol=1e-4)
        assert torch.allclose(states, stream.original[i], rtol=1e-4, atol=1e-4)
    for found, wanted in zip(Layered(source.root, torch.float32).logits(list(IDS)), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["olmo_hybrid", "kimi_linear"])
def test_what_is_put_together_is_written_in_its_parts(arch: str, make_checkpoint: Make, packed: Make) -> None:
    before, after = (load_file(path / "model.safetensors") for path in (make_checkpoint(arch=arch), packed(arch)))
    parts = [name for name in before if name.endswith(("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"))]
    assert len(parts) == 3
    assert all(torch.equal(after[name], before[name]) for name in parts)
    del after[parts[2]]
    broken = shutil.copytree(packed(arch), packed(arch).parent / "broken")
    save_file(after, broken / "model.safetensors", {"format": "pt"})
    relist(broken)
    with pytest.raises(VerifyError, match=r"conv1d\.weight is missing"):
        verify_checkpoint(broken)
    after[parts[2]] = before[parts[2]][1:].clone()
    save_file(after, broken / "model.safetensors", {"format": "pt"})
    relist(broken)
    with pytest.raises(VerifyError, match=re.escape(f"tensor {parts[2]} is")):
        verify_checkpoint(broken)


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda part: part[..., 1:], "do not fit together"), (lambda part: part[1:], "config.json asks for")],
)
def test_parts_that_do_not_fit_are_refused(
    change: Callable[[Tensor], Tensor], words: str, make_checkpoint: Make, tmp_path: Path
) -> None:
    original, name = tmp_path / "original", "model.layers.0.linear_attn.v_conv1d.weight"
    shutil.copytree(make_checkpoint(arch="olmo_hybrid"), original)
    tensors = load_file(original / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, original / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        quantize(original, tmp_path / "out", Recipe.from_dict({"method": "rtn", "scheme": {"group_size": 32}}))
    with pytest.raises(CheckpointError, match=words):
        load(original)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("arch", ["olmo_hybrid", "gemma4_text", "glm_moe_dsa"])
def test_a_run_is_resumed(arch: str, make_checkpoint: Make, packed: Make, tmp_path: Path) -> None:
    """Past tensors in parts, and past layers that have left something for others."""
    calibration = write_ids(tmp_path / "ids.jsonl", 12, 48)
    with pytest.raises(KeyboardInterrupt):
        quantize(make_checkpoint(arch=arch), tmp_path / "out", recipe(calibration), observer=StopAfter(2))
    quantize(make_checkpoint(arch=arch), tmp_path / "out", recipe(calibration))
    whole, resumed = (path / "model.safetensors" for path in (packed(arch), tmp_path / "out"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_all_that_runs_a_layer_knows_of_several_states(make_checkpoint: Make, tmp_path: Path) -> None:
    """A token has four in Gemma 3n: training, AWQ by the block's error, and sensitivity."""
    model, calibration = make_checkpoint(arch="gemma3n_text"), write_ids(tmp_path / "ids.jsonl", 12, 48)
    solver = {"train": 2, "awq_loss": "block"}
    quantize(model, tmp_path / "out", recipe(calibration, method="awq+gptq", solver=solver))
    original = load(model, torch.float32)
    assert 0 < compared(load(tmp_path / "out", torch.float32), original, IDS).divergence.mean_kl < 0.4
    found, _ = sense(model, recipe(calibration), isolated=True)
    assert all(each.measured > 0 for each in found.isolated)


def test_what_no_linear_owns_is_said(make_checkpoint: Make) -> None:
    model = make_checkpoint(arch="jamba")
    assert "model.layers.0.mamba.A_log" in derive_layout(AutoConfig.from_pretrained(model)).strays
    notes = preview(model, Recipe.from_dict({"method": "rtn", "scheme": {"group_size": 32}})).notes
    assert "mamba.A_log, mamba.conv1d.weight in 1 layers: no linear's, kept" in notes


def test_a_linear_of_a_few_columns_is_kept(make_checkpoint: Make) -> None:
    notes = preview(make_checkpoint(arch="gemma3n_text"), Recipe.from_dict({"scheme": {"group_size": -1}})).notes
    coefficients = "altup.prediction_coefs, altup.correction_coefs"
    assert f"{coefficients} in 2 layers: kept: 4 columns are less than any group" in notes
