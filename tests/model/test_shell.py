"""The shell holds one part at a time, and what it holds is the checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import ArchitectureError, CheckpointError, NumericsError
from llmquant.model.shell import Shell

LAYER = "model.layers.1"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    return tmp_path


def edit(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors.update({name: tensor for name, tensor in change.items() if tensor is not None})
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_a_part_is_filled_and_emptied_again(llama: Path) -> None:
    shell = Shell(Checkpoint.open(llama))
    assert all(p.device.type == "meta" for p in shell.model.parameters())
    expected = load_file(llama / "model.safetensors")
    with shell.filled(shell.part(LAYER)):
        filled = {name for name, p in shell.model.named_parameters() if p.device.type == "cpu"}
        assert filled == {name for name in expected if name.startswith(LAYER + ".")}
        for name in filled:
            assert torch.equal(shell.model.get_parameter(name), expected[name].float())
    assert all(p.device.type == "meta" for p in shell.model.parameters())


def test_a_part_is_emptied_when_the_work_in_it_fails(llama: Path) -> None:
    shell = Shell(Checkpoint.open(llama))
    with pytest.raises(ZeroDivisionError), shell.filled(shell.part(LAYER)):
        _ = 1 / 0
    assert all(p.device.type == "meta" for p in shell.model.parameters())


def test_what_a_router_adds_to_its_scores_keeps_its_bits(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """It decides between experts that are almost alike, and DeepSeek-V3's are large."""
    model = shutil.copytree(make_checkpoint(arch="deepseek_v3"), tmp_path / "model")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit(model, {bias: 8 + torch.arange(8) / 1024})
    shell = Shell(Checkpoint.open(model), dtype=torch.bfloat16)
    with shell.filled(shell.part(LAYER)):
        assert torch.equal(dict(shell.model.named_buffers())[bias], 8 + torch.arange(8) / 1024)
        assert shell.model.get_parameter(f"{LAYER}.self_attn.o_proj.weight").dtype == torch.bfloat16


def test_tied_head_needs_no_tensor(llama: Path) -> None:
    shell = Shell(Checkpoint.open(llama))
    assert "lm_head.weight" not in shell.names
    assert "model.embed_tokens.weight" in shell.names


def test_checkpoints_without_the_base_prefix_are_matched(tmp_path: Path) -> None:
    config = OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, word_embed_proj_dim=32
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {n.removeprefix("model."): t.clone() for n, t in tensors.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    shell = Shell(Checkpoint.open(tmp_path))
    name = "model.decoder.layers.0.fc1.weight"
    assert torch.equal(shell.read(name), tensors[name])


def test_a_missing_tensor_is_named(llama: Path) -> None:
    edit(llama, {"model.layers.0.mlp.up_proj.weight": None})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is missing"):
        Shell(Checkpoint.open(llama))


def test_a_wrong_shape_is_named(llama: Path) -> None:
    edit(llama, {"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 32, dtype=torch.bfloat16)})
    shell = Shell(Checkpoint.open(llama))
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight: shape \(3, 32\), but config\.json asks for \(48, 32\)"
    ):
        shell.read("model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_weight_is_named_with_its_index(llama: Path, poison: float) -> None:
    weight = torch.zeros(48, 32, dtype=torch.bfloat16)
    weight[7, 3] = poison
    edit(llama, {"model.layers.1.mlp.up_proj.weight": weight})
    with pytest.raises(
        NumericsError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight: .* at index \[7, 3\]"
    ):
        Shell(Checkpoint.open(llama)).read("model.layers.1.mlp.up_proj.weight")


def test_extra_tensors_are_listed(llama: Path) -> None:
    edit(llama, {"model.mtp.weight": torch.zeros(2)})
    assert Shell(Checkpoint.open(llama)).extra == ["model.mtp.weight"]


def test_an_unknown_model_type_is_one_line(llama: Path) -> None:
    config = (llama / "config.json").read_text().replace('"llama"', '"never_heard_of"')
    (llama / "config.json").write_text(config)
    with pytest.raises(ArchitectureError, match="never_heard_of") as caught:
        Shell(Checkpoint.open(llama))
    assert "\n" not in str(caught.value)
