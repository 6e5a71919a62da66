"""What tensors are called in checkpoints, where transformers has renamed them since."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import ArchitectureError, CheckpointError
from llmquant.model.names import Names, are_put_together, renamings
from llmquant.model.shell import Shell, empty_model, read_config
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.loader import load

Make = Callable[..., Path]


@pytest.fixture
def renamed(make_checkpoint: Make, tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """A checkpoint of the Llama family with other names, by what they were; without those that have none."""

    def make(others: dict[str, str]) -> Path:
        directory = Path(shutil.copytree(make_checkpoint(), tmp_path / "model"))
        tensors = load_file(directory / "model.safetensors")
        named = {others.get(name, name): tensor for name, tensor in tensors.items() if others.get(name, name)}
        save_file(named, directory / "model.safetensors", {"format": "pt"})
        return directory

    return make


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("gpt_neox", {"lm_head.weight": "embed_out.weight"}),
        (
            "mixtral",
            {
                "model.layers.1.mlp.gate.weight": "model.layers.1.block_sparse_moe.gate.weight",
                "model.layers.1.mlp.experts.3.up_proj.weight": "model.layers.1.block_sparse_moe.experts.3.w3.weight",
                "model.layers.1.mlp.experts.3.down_proj.weight": "model.layers.1.block_sparse_moe.experts.3.w2.weight",
            },
        ),
        (
            "hy_v3",
            {
                "model.layers.1.mlp.gate.weight": "model.layers.1.mlp.router.gate.weight",
                "model.layers.1.mlp.e_score_correction_bias": "model.layers.1.mlp.expert_bias",
                "model.layers.1.mlp.shared_experts.up_proj.weight": "model.layers.1.mlp.shared_mlp.up_proj.weight",
            },
        ),
    ],
)
def test_renamed_tensors_are_found(arch: str, names: dict[str, str], make_checkpoint: Make) -> None:
    source = Checkpoint.open(make_checkpoint(arch=arch))
    found = Names(empty_model(read_config(source)), source).all()
    assert found | {name: (stored,) for name, stored in names.items()} == found
    assert len({*found.values()}) == len(found)


@pytest.mark.parametrize("arch", ["mixtral", "hy_v3", "phimoe", "olmo_hybrid"])
def test_they_are_saved_under_the_names_of_the_checkpoint(arch: str, make_checkpoint: Make, tmp_path: Path) -> None:
    quantize(make_checkpoint(arch=arch), tmp_path / "packed", Recipe(method="rtn"))
    load(tmp_path / "packed").save_pretrained(tmp_path / "saved")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "saved"))
    assert before.keys() == after.keys()


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_what_is_called_as_it_is_in_transformers_needs_no_rule(arch: str, make_checkpoint: Make) -> None:
    assert renamings(empty_model(read_config(Checkpoint.open(make_checkpoint(arch=arch))))) == []


def test_a_missing_tensor_is_to_be_fetched(renamed: Callable[[dict[str, str]], Path]) -> None:
    directory = renamed({"model.layers.1.mlp.up_proj.weight": ""})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is missing .*; fetch the checkpoint"):
        Shell(Checkpoint.open(directory))


def test_what_might_be_meant_is_named(renamed: Callable[[dict[str, str]], Path]) -> None:
    directory = renamed(
        {
            "model.layers.1.mlp.up_proj.weight": "model.layers.1.mlp.linear_v.weight",
            "model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.linear_v.weight",
        }
    )
    with pytest.raises(CheckpointError) as caught:
        Shell(Checkpoint.open(directory))
    assert str(caught.value) == (
        f"{directory}: tensor model.layers.0.mlp.up_proj.weight is missing from every shard, and "
        "model.layers.0.mlp.linear_v.weight is there, which LlamaForCausalLM does not have; "
        "these names are not supported"
    )


def test_what_stands_beside_the_model_is_not_meant(renamed: Callable[[dict[str, str]], Path]) -> None:
    directory = renamed({"model.layers.1.mlp.up_proj.weight": "vision.layers.1.mlp.up_proj.weight"})
    with pytest.raises(CheckpointError, match="fetch the checkpoint again"):
        Shell(Checkpoint.open(directory))


def test_a_part_of_a_packed_weight_is_to_be_fetched(make_checkpoint: Make, tmp_path: Path) -> None:
    quantize(make_checkpoint(), tmp_path, Recipe(method="rtn"))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale is missing .*; fetch the checkpoint again"):
        load(tmp_path)


def test_experts_of_another_kind_are_refused_before_their_names_are_looked_for(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}
    config = AutoConfig.for_model("llama4_text", **sizes, **heads, num_local_experts=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ArchitectureError, match="Llama4ForCausalLM has experts of a kind that is not known"):
        Shell(Checkpoint.open(tmp_path))


def test_it_is_known_whose_experts_transformers_puts_together() -> None:
    assert are_put_together("mixtral")
    assert are_put_together("qwen3_5_moe", "qwen3_5_moe_text")
    assert not are_put_together("gemma4", "gemma4_text")
    assert not are_put_together("qwen3_vl_moe", "qwen3_vl_moe_text")
    assert not are_put_together("llama")
