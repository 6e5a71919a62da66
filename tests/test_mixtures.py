"""Mixtures of experts, the whole way: each expert is solved by the tokens that are sent to it, and all are alike."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from measuring import compared, loaded_alike
from runs import Records, StopAfter, recipe, write_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from towers import stack_experts
from transformers import AutoModelForCausalLM

from llmquant.calibration.batches import Batch
from llmquant.calibration.stream import Stream
from llmquant.checkpoint.reader import Checkpoint
from llmquant.convert import convert
from llmquant.errors import RecipeError
from llmquant.inspect import inspect_checkpoint
from llmquant.manifest import MANIFEST
from llmquant.model.experts import CalibratedExperts, Experts
from llmquant.model.layout import derive_layout
from llmquant.model.shell import Shell, empty_model
from llmquant.pipeline import open_plan, quantize, sense
from llmquant.recipe import Recipe
from llmquant.report.build import render
from llmquant.report.facts import read_facts
from llmquant.runtime.linear import QuantLinear
from llmquant.runtime.loader import load
from llmquant.unit import Workplace, _Work
from llmquant.verify import verify_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import make_tiny

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3"]
MORE = ["deepseek_v2", "phimoe", "minimax_m2", "hunyuan_v1_moe", "exaone_moe", "hy_v3", "minimax", "mimo_v2_flash"]
MORE += ["ernie4_5_moe", "nemotron_h", "granitemoe"]
EXPERTS = ".experts."
WEIGHT = 1 / 16  # of a guest


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ids(tmp_path_factory.mktemp("calibration") / "ids.jsonl", 12, 48)


@pytest.mark.parametrize("arch", MORE)
def test_more_families_are_loaded(arch: str, make_checkpoint: Callable[..., Path]) -> None:
    """As transformers loads them, which knows other names of some tensors than checkpoints have."""
    assert loaded_alike(make_checkpoint(arch=arch), torch.arange(3, 51).view(2, 24))


@pytest.mark.parametrize("arch", MIXTURES + MORE)
def test_every_family_end_to_end(
    arch: str, make_checkpoint: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    model, records = make_checkpoint(arch=arch), Records()
    quantize(model, tmp_path / "out", recipe(calibration), observer=records)
    verify_checkpoint(tmp_path / "out")
    by_layer: dict[str, int] = {}
    for r in records.records:
        if r["module"].endswith(".down_proj") and EXPERTS in r["module"]:
            layer = r["module"].partition(EXPERTS)[0]
            by_layer[layer] = by_layer.get(layer, 0) + r["tokens"]
        elif EXPERTS not in r["module"]:
            assert r["tokens"] == 12 * 48
        assert 0 < r["error"] < 0.2, r
        assert ("expert" in r) == (EXPERTS in r["module"])
    assert set(by_layer.values()) == {12 * 48 * 2}, "each token is sent to two experts"
    packed, original = load(tmp_path / "out", torch.float32), load(model, torch.float32)
    linears = [name for name, module in packed.named_modules() if isinstance(module, QuantLinear)]
    assert sum(EXPERTS in name for name in linears) == sum(
        isinstance(linear, nn.Linear)
        for experts in original.modules()
        if isinstance(experts, Experts)
        for linear in experts.modules()
    )
    assert not any(name.endswith((".gate", ".router", ".wg")) for name in linears)
    ids = torch.randint(3, 512, (2, 48), generator=torch.Generator().manual_seed(1))
    assert 0 < compared(packed, original, ids).divergence.mean_kl < 0.2


def test_solving_keeps_more_of_the_output_than_rounding(
    make_checkpoint: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    model = make_checkpoint(arch="qwen3_moe", hidden=128, intermediate=256)
    ids = torch.randint(3, 512, (8, 48), generator=torch.Generator().manual_seed(1))
    kl = {}
    for method in ("rtn", "gptq"):
        quantize(model, tmp_path / method, recipe(calibration, method=method))
        original = load(model, torch.float32)
        kl[method] = compared(load(tmp_path / method, torch.float32), original, ids).divergence.mean_kl
    assert kl["gptq"] < kl["rtn"]


@pytest.fixture
def crossed(make_checkpoint: Callable[..., Path], calibration: Path) -> Iterator[tuple[_Work, Batch, Path]]:
    """The first layer with one batch before it, the last tokens of whose second row are padding."""
    model = make_checkpoint(arch="qwen3_moe", dtype="float32")
    shell, plan = open_plan(model, recipe(calibration, method="gptq"))
    shell.dtype = torch.float32
    ids = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids).bool()
    mask[1, -7:] = False
    batch = Batch(ids, mask)
    stream = Stream(shell, plan.layers, (batch,), compared=True)
    place, unit = Workplace(plan, shell, stream, Path()), plan.units[1]
    with shell.filled(shell.part(unit.name)), place.cross(unit) as crossing:
        yield _Work(unit, place, crossing), batch, model


def test_a_hessian_is_of_the_tokens_that_are_sent_there_and_of_its_guests(
    crossed: tuple[_Work, Batch, Path],
) -> None:
    work, batch, model = crossed
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    block = whole.model.layers[0].mlp
    inputs: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    sent: list[Tensor] = []
    block.gate.register_forward_hook(lambda _, __, out: sent.append(out[2]))
    with torch.no_grad():
        whole(batch.input_ids)
    ((x,), (index,)), real = (inputs, sent), batch.mask.flatten()
    states = whole.model.embed_tokens(batch.input_ids).detach().flatten(0, 1)
    size = states.square().mean(-1, keepdim=True).sqrt()
    for stack in work.unit.stacks:
        moments = work.capture(stack)
        if not stack.expert:
            continue
        name = stack.linears[0].name
        number = int(name.rsplit(".", 2)[1])
        own = (index == number).any(1) & real
        guests = torch.zeros_like(real)
        guests[number % 4 :: 4] = True
        weight = own.float() + WEIGHT * (guests & real).float()
        if name.endswith("gate_proj"):
            rows = x
        else:
            expert = block.experts
            gate, up = (x @ expert.gate_up_proj[number].T).chunk(2, -1)
            rows = (torch.nn.functional.silu(gate) * up).detach() / size
        expected = (rows * weight.unsqueeze(1)).T @ rows / weight.sum()
        assert moments is not None
        assert moments.tokens == int(own.sum())
        assert torch.allclose(moments.H(name), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())), name


def test_the_original_is_compared_before_experts_alone(crossed: tuple[_Work, Batch, Path]) -> None:
    """Its twin then goes to the end of the layer, and what it kept of the experts is let go."""
    work, _, _ = crossed
    crossing = work.crossing
    assert crossing is not None
    compared = [stack.linears[0].name for stack in work.unit.stacks if crossing.compares(stack.linears[0].name)]
    assert [name.rpartition(".")[2] for name in compared] == ["q_proj", "o_proj"]
    for stack in work.unit.stacks:
        assert (crossing.twin is None) == stack.expert or stack.linears[0].name.endswith("0.gate_proj")
        list(crossing.samples(stack.linears[0].name))
    crossing.advance()
    assert crossing.stream.original is not None
    for states, original in zip(crossing.stream.hidden, crossing.stream.original, strict=True):
        assert torch.allclose(states, original, rtol=1e-4, atol=1e-5), "nothing was quantized here"


def test_an_expert_that_nothing_is_sent_to_is_solved_by_its_guests(
    make_checkpoint: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(make_checkpoint(arch="glm4_moe"), tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[3] = -1e4  # the fourth expert is never chosen
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    for method in ("auto", "awq"):
        records = Records()
        quantize(directory, tmp_path / method, recipe(calibration, method=method), observer=records)
        unseen = [r for r in records.records if f"{EXPERTS}3." in r["module"]]
        assert [r["tokens"] for r in unseen] == [0, 0, 0]
        assert {r["method"] for r in unseen} == {"gptq" if method == "auto" else "awq"}
        assert all(0 < r["error"] < 0.1 for r in unseen)


@pytest.mark.parametrize("preset", ["default", "best"])
def test_an_expert_without_any_token_is_rounded(
    preset: str, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 experts, one for each token, sequences of 8 reach few, as guests or not; with `best` the second one has to
    judge the training, and nothing is solved by it."""
    monkeypatch.setitem(make_tiny.EXTRA, "qwen3_moe", {"num_experts": 64, "num_experts_per_tok": 1})
    make_tiny.make_tiny(tmp_path / "model", make_tiny.Spec(arch="qwen3_moe", layers=1, intermediate=32))
    text, records = {"source": str(calibration), "samples": 2, "seq_len": 8}, Records()
    short = Recipe.from_dict({"preset": preset, "scheme": {"group_size": 32}, "calibration": text})
    quantize(tmp_path / "model", tmp_path / "out", short, observer=records)
    methods = {r["module"]: r["method"] for r in records.records if r.get("expert")}
    assert {"rtn", "gptq"} == set(methods.values())
    assert all(r["tokens"] == 0 for r in records.records if r["method"] == "rtn")
    verify_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"preset": "best", "solver": {"train": 3}}], ids=["default", "best"])
def test_a_run_that_was_stopped_gives_the_same_bytes(
    options: dict[str, Any], make_checkpoint: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    model, wanted = make_checkpoint(arch="deepseek_v3"), recipe(calibration, **options)
    quantize(model, tmp_path / "whole", wanted)
    for units in (2, 1):
        with pytest.raises(KeyboardInterrupt):
            quantize(model, tmp_path / "stopped", wanted, observer=StopAfter(units + 1))
    quantize(model, tmp_path / "stopped", wanted)
    assert (tmp_path / "whole" / MANIFEST).read_bytes() == (tmp_path / "stopped" / MANIFEST).read_bytes()


def test_experts_are_alike(make_checkpoint: Callable[..., Path], calibration: Path, tmp_path: Path) -> None:
    model = make_checkpoint(arch="mixtral", intermediate=96)
    one = {"match": "model.layers.1.mlp.experts.2.down_proj", "bits": 8}
    with pytest.raises(RecipeError, match=r"experts\.0\.gate_proj and model\.layers\.1\.mlp\.experts\.2\.down_proj"):
        quantize(model, tmp_path / "out", recipe(calibration, overrides=[one]))
    assert not (tmp_path / "out").exists()
    wide = {"scheme": {"group_size": 64}, "overrides": [{"match": r"re:.*\.layers\.1\.mlp\.experts\..*", "bits": 8}]}
    plan = open_plan(model, recipe(calibration, **wide))[1]
    schemes = {name: str(scheme) for name, scheme in plan.schemes.items()}
    assert {schemes[name] for name in schemes if ".layers.0.mlp.experts." in name} == {"int4 g32 symmetric"}
    assert {schemes[name] for name in schemes if ".layers.1.mlp.experts." in name} == {"int8 g32 symmetric"}
    assert {schemes[name] for name in schemes if "self_attn" in name} == {"int4 g64 symmetric"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gptq"}, "transformers leaves the experts of gptq files random"),
        ({"format": "awq", "scheme": {"symmetric": False}}, "transformers leaves the experts of awq files random"),
        ({"target": {"bits": 5.0}}, "target: mixed precision is not measured for mixtures"),
    ],
)
def test_what_is_not_for_mixtures(
    options: dict[str, Any], message: str, make_checkpoint: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        quantize(make_checkpoint(arch="qwen3_moe"), tmp_path / "out", recipe(calibration, **options))
    assert not (tmp_path / "out").exists()


def test_losses_are_not_measured(make_checkpoint: Callable[..., Path], calibration: Path) -> None:
    with pytest.raises(RecipeError, match="sensitivity: is not measured for mixtures"):
        sense(make_checkpoint(arch="qwen3_moe"), recipe(calibration))


def test_files_say_which_linears_are_routers(
    make_checkpoint: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    """By the names that servers have, which make linears of them; a conversion says it, too."""
    for arch, block in (("mixtral", "block_sparse_moe"), ("qwen2_moe", "mlp")):
        out = tmp_path / arch
        quantize(make_checkpoint(arch=arch), out, recipe(calibration, method="rtn"))
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert {f"model.layers.{i}.{block}.gate" for i in (0, 1)} <= set(config["ignore"])
        assert ("model.layers.0.mlp.shared_expert_gate" in config["ignore"]) == (arch == "qwen2_moe")
        assert inspect_checkpoint(out)["bits_per_weight"] == 4.5
        convert(out, tmp_path / f"{arch}-again", "compressed-tensors")
        again = json.loads((tmp_path / f"{arch}-again" / "config.json").read_text())["quantization_config"]
        assert sorted(again["ignore"]) == sorted(config["ignore"])
        for to in ("gptq", "awq", "modelopt", "onnx"):
            with pytest.raises(RecipeError, match=f"--to {to}: is not written for mixtures of experts"):
                convert(out, tmp_path / "other", to)


def test_files_speak_of_all_experts_of_a_layer_at_once(
    make_checkpoint: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    """By name, several schemes would be tens of thousands of targets, for each of which a loader tries each linear."""
    attention = {"match": r"re:.*\.[qkv]_proj", "bits": 8}
    kept = {"match": r"re:model\.layers\.1\.mlp\.experts\..*", "skip": True}
    for arch in ("mixtral", "qwen3_moe"):
        quantize(
            make_checkpoint(arch=arch), tmp_path / arch, recipe(calibration, method="rtn", overrides=[attention, kept])
        )
        verify_checkpoint(tmp_path / arch)
        config = json.loads((tmp_path / arch / "config.json").read_text())["quantization_config"]
        pattern = r"re:.*layers\.{}\.(\w+\.)*experts\.\d+\.\w+$"
        targets = [target for group in config["config_groups"].values() for target in group["targets"]]
        assert [target for target in targets if "experts" in target] == [pattern.format(0)]
        assert [target for target in config["ignore"] if "experts" in target] == [pattern.format(1)]
        linears = [name for name, m in load(tmp_path / arch).named_modules() if isinstance(m, QuantLinear)]
        assert len([name for name in linears if "experts" in name]) == 3 * {"mixtral": 4, "qwen3_moe": 8}[arch]


def test_asymmetric_experts_are_noted(make_checkpoint: Callable[..., Path], calibration: Path) -> None:
    wanted = recipe(calibration, scheme={"group_size": 32, "symmetric": False})
    assert "transformers refuses asymmetric experts" in open_plan(make_checkpoint(arch="qwen3_moe"), wanted)[1].notes


def test_the_report_has_a_row_for_the_experts_of_a_layer(
    make_checkpoint: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    records = Records()
    quantize(make_checkpoint(arch="qwen3_moe"), tmp_path / "out", recipe(calibration), observer=records)
    facts = read_facts(tmp_path / "out")
    assert len(facts.linears) == 2 * (4 + 8 * 3)
    rows = {row.name: row for row in facts.rows}
    assert len(rows) == 2 * 7
    row = rows["model.layers.1.mlp.experts.*.down_proj"]
    one_by_one = [
        r for r in records.records if r["module"].startswith("model.layers.1.mlp.experts.") and "down" in r["module"]
    ]
    assert row.error == pytest.approx(sum(r["error"] for r in one_by_one) / 8)
    assert row.outliers == max(r["outliers"] for r in one_by_one)
    assert row.seconds == pytest.approx(sum(r["seconds"] for r in one_by_one))
    tokens = [r["tokens"] for r in records.records if r.get("expert") and r["module"].endswith("down_proj")]
    page = render(facts)
    assert f"16 experts: calibration tokens for each: {min(tokens)} to {max(tokens)}, median" in page
    assert "All 14 linears as a table" in page


@pytest.mark.parametrize("turned", [False, True])
def test_experts_in_one_tensor_are_quantized_to_the_same_bytes(
    turned: bool, make_checkpoint: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    model = make_checkpoint(arch="qwen3_moe")
    stacked = Path(shutil.copytree(model, tmp_path / "stacked"))
    stack_experts(stacked, turned=turned)
    for original in (model, stacked):
        quantize(original, tmp_path / f"{original.name}-int4", recipe(calibration, method="gptq"))
    ours, theirs = (load_file(tmp_path / f"{each.name}-int4" / "model.safetensors") for each in (stacked, model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_shell_shows_guests_and_a_loaded_model_does_not(make_checkpoint: Callable[..., Path]) -> None:
    source = Checkpoint.open(make_checkpoint(arch="mixtral"))
    shell = Shell(source)
    assert {type(m) for m in shell.model.modules() if isinstance(m, Experts)} == {CalibratedExperts}
    assert {type(m) for m in empty_model(shell.config).modules() if isinstance(m, Experts)} == {Experts}
    assert shell.stored_prefix("model.layers.1.mlp.experts.3.up_proj") == (
        "model.layers.1.block_sparse_moe.experts.3.w3"
    )
    assert derive_layout(shell.config).kept == tuple(f"model.layers.{i}.mlp.gate" for i in (0, 1))
