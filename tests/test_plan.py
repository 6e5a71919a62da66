"""Every decision before any work: schemes, fallbacks, fused groups, files, bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmquant import plan as plan_module
from llmquant.checkpoint.parts import read_tensors
from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import CheckpointError, OutputError, RecipeError
from llmquant.model.shell import Shell
from llmquant.pipeline import quantize
from llmquant.plan import Plan, make_plan
from llmquant.recipe import Recipe
from llmquant.scheme import Scheme


def planned(model: Path, **recipe: object) -> Plan:
    return make_plan(Recipe.from_dict(recipe), Shell(Checkpoint.open(model)))


def test_a_group_size_that_does_not_divide_falls_back_in_the_open(make_checkpoint: Callable[..., Path]) -> None:
    model = make_checkpoint(hidden=96, intermediate=128)
    plan = planned(model, method="rtn", scheme={"group_size": 128})
    assert plan.schemes["model.layers.0.self_attn.q_proj"] == Scheme(4, 32)  # 96 = 3 * 32
    assert plan.schemes["model.layers.0.mlp.down_proj"] == Scheme(4, 128)
    assert plan.notes[0].startswith("self_attn.q_proj, self_attn.k_proj, ")
    assert plan.notes[0].endswith("in 2 layers: group size 128 does not divide 96 columns: int4 g32 symmetric")


def test_where_nothing_divides_the_whole_row_is_the_group(make_checkpoint: Callable[..., Path]) -> None:
    plan = planned(make_checkpoint(hidden=40, heads=2, kv_heads=1), method="rtn", scheme={"group_size": 64})
    assert plan.schemes["model.layers.0.self_attn.q_proj"] == Scheme(4, -1)


def test_awq_files_hold_a_single_scheme(make_checkpoint: Callable[..., Path]) -> None:
    model = make_checkpoint(hidden=96, intermediate=128)
    with pytest.raises(RecipeError, match=r"awq holds one scheme, but linears get int4 g32 .* and int4 g128"):
        planned(model, method="rtn", format="awq", scheme={"group_size": 128, "symmetric": False})
    assert planned(model, method="rtn", format="awq", scheme={"group_size": 32, "symmetric": False})


def test_overrides_must_not_split_what_servers_fuse(tiny_checkpoint: Path) -> None:
    with pytest.raises(RecipeError, match=r"q_proj and .*k_proj share an input"):
        planned(tiny_checkpoint, overrides=[{"match": "re:.*q_proj", "bits": 8}])


def test_overrides_of_whole_groups_are_followed(tiny_checkpoint: Path) -> None:
    plan = planned(
        tiny_checkpoint,
        scheme={"group_size": 64},
        overrides=[{"match": "re:.*down_proj", "bits": 8}, {"match": "re:.*layers.0.*o_proj", "skip": True}],
    )
    assert plan.schemes["model.layers.1.mlp.down_proj"] == Scheme(8, 64)
    assert "model.layers.0.self_attn.o_proj" not in plan.schemes
    assert "model.layers.1.self_attn.o_proj" in plan.schemes


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_planned_bytes_are_the_bytes_written(
    tiny_checkpoint: Path, tmp_path: Path, format: str, symmetric: bool
) -> None:
    refused = {("gptq", False): "asymmetric GPTQ", ("awq", True): "symmetric weights waste; use --asym"}
    if message := refused.get((format, symmetric)):
        with pytest.raises(RecipeError, match=message):
            planned(tiny_checkpoint, format=format, scheme={"symmetric": symmetric})
        return
    recipe = Recipe.from_dict({"method": "rtn", "format": format, "scheme": {"group_size": 32, "symmetric": symmetric}})
    plan = quantize(tiny_checkpoint, tmp_path / "out", recipe)
    tensors = read_tensors(tmp_path / "out" / "model.safetensors")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        name: spec for unit in plan.units for shard in unit.shards for name, spec in shard.tensors.items()
    }
    assert plan.bytes_out == sum(t.nbytes for t in tensors.values())


def test_large_models_keep_one_file_per_layer(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "SHARD_BYTES", 40_000)
    plan = quantize(tiny_checkpoint, tmp_path / "out", Recipe(method="rtn", scheme=Scheme(4, 64)))
    files = [shard.file for unit in plan.units for shard in unit.shards]
    assert not plan.merged
    assert len(files) > 3
    for unit in plan.units:  # no file holds tensors of two layers; only a single tensor may exceed the limit
        for shard in unit.shards:
            assert (tmp_path / "out" / shard.file).is_file()
            assert len(shard.tensors) == 1 or sum(map(plan_module.spec_bytes, shard.tensors.values())) <= 40_000
    assert Checkpoint.open(tmp_path / "out").files == tuple(sorted(files))


def test_an_already_quantized_input_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(tiny_checkpoint, tmp_path / "once", Recipe(method="rtn", scheme=Scheme(4, 64)))
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize(tmp_path / "once", tmp_path / "twice", Recipe(method="rtn"))


def test_max_memory_refuses_before_any_work(tiny_checkpoint: Path) -> None:
    with pytest.raises(OutputError, match="--max-memory: this run needs about"):
        make_plan(Recipe(), Shell(Checkpoint.open(tiny_checkpoint)), max_memory=1_000_000)


def test_skipping_everything_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(RecipeError, match="no linear is left"):
        planned(tiny_checkpoint, overrides=[{"match": "re:.*", "skip": True}])


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(4, 64, False), Scheme(8, 32), Scheme(4, -1)], ids=str)
def test_bits_per_weight_count_scales_and_zeros(tiny_checkpoint: Path, scheme: Scheme) -> None:
    plan = planned(
        tiny_checkpoint,
        method="rtn",
        scheme={"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric},
    )
    bits = 0.0
    weights = 0
    for linear in plan.linears:
        per_group = 16 + (0 if scheme.symmetric else scheme.bits)
        bits += linear.m * (linear.n * scheme.bits + scheme.groups(linear.n) * per_group)
        weights += linear.m * linear.n
    assert plan.bits_per_weight() == pytest.approx(bits / weights)


def test_the_tied_head_stays_tied(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = make_checkpoint(tied=1)
    plan = quantize(model, tmp_path / "out", Recipe(method="rtn", scheme=Scheme(4, 64)))
    assert "lm_head: tied to the embedding, kept" in plan.notes
    assert not any("lm_head" in name for name in read_tensors(tmp_path / "out" / "model.safetensors"))


def test_unquantized_tensors_keep_name_dtype_and_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(tiny_checkpoint, tmp_path / "out", Recipe(method="rtn", scheme=Scheme(4, 64)))
    before, after = Checkpoint.open(tiny_checkpoint), read_tensors(tmp_path / "out" / "model.safetensors")
    kept = [name for name in before.tensors if name in after]
    assert any("layernorm" in name for name in kept)
    assert "model.embed_tokens.weight" in kept
    for name in kept:
        assert torch.equal(before.read(name), after[name])


def test_ranks_that_cannot_share_a_linear_are_named_before_anything_is_written(
    make_checkpoint: Callable[..., Path],
) -> None:
    model = make_checkpoint(hidden=128, intermediate=192, heads=8, kv_heads=2)
    plan = planned(model, method="rtn", scheme={"group_size": 32}, tensor_parallel=[1, 2, 4, 8])
    assert [note for note in plan.notes if "parallel" in note] == [
        "tensor parallel 4: mlp.down_proj in 2 layers: 48 columns on each rank are no multiple of the group size 32",
        "tensor parallel 8: self_attn.o_proj in 2 layers: 16 columns on each rank are no multiple of the group size 32",
        "tensor parallel 8: mlp.down_proj in 2 layers: 24 columns on each rank are no multiple of the group size 32",
    ]


def test_ranks_cut_no_word_of_packed_rows(make_checkpoint: Callable[..., Path]) -> None:
    model = make_checkpoint(hidden=64, intermediate=160, heads=8, kv_heads=8)
    found = {}
    for layout, symmetric in (("compressed-tensors", True), ("awq", False)):
        scheme = {"group_size": -1, "symmetric": symmetric}
        plan = planned(model, method="rtn", scheme=scheme, format=layout, tensor_parallel=[8])
        found[layout] = [note for note in plan.notes if "parallel" in note]
    assert found["compressed-tensors"] == [
        "tensor parallel 8: mlp.down_proj in 2 layers: 20 columns on each rank end inside a word of weight_packed"
    ]
    assert found["awq"] == [
        "tensor parallel 8: mlp.gate_proj, mlp.up_proj in 2 layers: 20 rows on each rank end inside a word of qweight"
    ]


def test_heads_are_shared_out_whole(make_checkpoint: Callable[..., Path]) -> None:
    plan = planned(make_checkpoint(), method="rtn", scheme={"group_size": -1}, tensor_parallel=[3])
    assert "tensor parallel 3: 4 attention heads cannot be shared out" in plan.notes
    assert any(note.startswith("tensor parallel 3: ") and "rows cannot be shared out" in note for note in plan.notes)
