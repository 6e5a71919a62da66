"""Conversions between packed layouts: the same integers, there and back byte for byte; or a refusal before any work."""

import json
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmquant import plan as plan_module
from llmquant.checkpoint import durable
from llmquant.checkpoint.parts import read_tensors
from llmquant.convert import convert
from llmquant.errors import CheckpointError, OutputError, RecipeError, VerifyError
from llmquant.formats import FORMATS
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.loader import load
from llmquant.scheme import Scheme
from llmquant.verify import verify_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from foreign import gptq_tensors, rewrite, rounded

INPUT = torch.arange(48).reshape(2, 24)


@pytest.fixture(scope="module")
def made(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Scheme], Path]:
    """`made(scheme)`: a model in compressed-tensors, with biases; no zero point of it is 0, which GPTQ cannot hold."""
    found: dict[Scheme, Path] = {}

    def make(scheme: Scheme) -> Path:
        if scheme not in found:
            found[scheme] = tmp_path_factory.mktemp("source") / "model"
            model = make_checkpoint(arch="qwen2", layers=1, hidden=128, intermediate=128)
            quantize(model, found[scheme], Recipe(method="rtn", scheme=scheme))
        return found[scheme]

    return make


def assert_same_bytes(one: Path, other: Path) -> None:
    before, after = (read_tensors(path / "model.safetensors") for path in (one, other))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape)
        assert torch.equal(tensor, after[name]), name
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 64), Scheme(4, 32, symmetric=False), Scheme(8, -1), Scheme(3, 64)], ids=str
)
def test_every_pair_of_layouts(made: Callable[[Scheme], Path], tmp_path: Path, scheme: Scheme) -> None:
    """A to B is the same as B straight from the source, whatever A is: so is A to B to A."""
    layouts = [layout for layout in FORMATS if FORMATS[layout].refuse(128, 128, scheme) is None]
    forms = {"compressed-tensors": made(scheme)}
    for layout in layouts[1:]:
        forms[layout] = tmp_path / layout
        convert(forms["compressed-tensors"], forms[layout], layout)
    for a, b in permutations(layouts, 2):
        if a != "compressed-tensors":
            convert(forms[a], tmp_path / "there", b, overwrite=True)
            assert_same_bytes(tmp_path / "there", forms[b])
    expected = load(forms["compressed-tensors"], torch.float32)(INPUT).logits
    for layout in layouts:
        assert torch.equal(load(forms[layout], torch.float32)(INPUT).logits, expected)


@pytest.mark.parametrize(
    ("scheme", "to", "message"),
    [
        (Scheme(8, 32), "awq", r"q_proj: awq cannot hold it: it has 4 bits, not 8"),
        (Scheme(3, 64), "awq", r"q_proj: awq cannot hold it: it has 4 bits, not 3"),
    ],
)
def test_bits_that_the_target_lacks(
    made: Callable[[Scheme], Path], tmp_path: Path, scheme: Scheme, to: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        convert(made(scheme), tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_several_schemes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = {"method": "rtn", "scheme": {"group_size": 32}, "overrides": [{"match": "re:.*down_proj", "bits": 8}]}
    quantize(tiny_checkpoint, tmp_path / "mixed", Recipe.from_dict(recipe))
    made = convert(tmp_path / "mixed", tmp_path / "gptq", "gptq")
    assert any("single scheme" in note for note in made.notes)
    convert(tmp_path / "gptq", tmp_path / "back", "compressed-tensors")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("mixed", "back"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with pytest.raises(RecipeError, match="awq cannot hold it"):
        convert(tmp_path / "mixed", tmp_path / "awq", "awq")


@pytest.fixture
def reordered(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A GPTQ checkpoint with activation order, as another tool writes it."""
    generator = np.random.default_rng(0)

    def change(name: str, W: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        groups = generator.permutation(np.arange(W.shape[1]) // 32)
        q, meaning = rounded(W, groups, bits=4, symmetric=True)
        return gptq_tensors(q, groups, 4, version=1), meaning

    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True}
    rewrite(tiny_checkpoint, tmp_path / "reordered", block, change)
    return tmp_path / "reordered"


def test_act_order_stays_in_gptq(reordered: Path, tmp_path: Path) -> None:
    for to in ("awq", "compressed-tensors"):
        with pytest.raises(RecipeError, match=rf"q_proj: its columns are reordered \(desc_act\), which {to} cannot"):
            convert(reordered, tmp_path / to, to)
        assert not (tmp_path / to).exists()
    convert(reordered, tmp_path / "v2", "gptq_v2")
    convert(tmp_path / "v2", tmp_path / "v1", "gptq")
    before, after = (load_file(path / "model.safetensors") for path in (reordered, tmp_path / "v1"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert json.loads((tmp_path / "v1" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    assert torch.equal(load(tmp_path / "v2")(INPUT).logits, load(reordered)(INPUT).logits)


def test_scales_that_the_model_cannot_hold_keep_their_dtype(reordered: Path, tmp_path: Path) -> None:
    """Scales of 11 bits in a model of bf16: they stay fp16, and what is loaded stays the same."""
    tensors = load_file(reordered / "model.safetensors")
    assert not torch.equal(tensors["model.layers.0.mlp.up_proj.scales"].bfloat16().half(), tensors[
        "model.layers.0.mlp.up_proj.scales"
    ])  # fmt: skip
    convert(reordered, tmp_path / "v2", "gptq_v2")
    assert load_file(tmp_path / "v2" / "model.safetensors")["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16


def test_zero_points_of_zero_do_not_fit_into_version_1(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(tiny_checkpoint, tmp_path / "awq", Recipe(method="rtn", format="awq", scheme=Scheme(4, 32, False)))
    tensors = load_file(tmp_path / "awq" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.qzeros"
    tensors[name][0, 0] = 0
    save_file(tensors, tmp_path / "awq" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"up_proj\.qzeros: row 0, group 0 has zero point 0, which gptq cannot store"):
        convert(tmp_path / "awq", tmp_path / "v1", "gptq")
    assert not (tmp_path / "v1" / "config.json").exists()
    convert(tmp_path / "awq", tmp_path / "v2", "gptq_v2")
    assert verify_checkpoint(tmp_path / "v2")


def test_an_original_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not quantized; run llmquant quantize first"):
        convert(tiny_checkpoint, tmp_path / "out", "gptq")


def test_large_models_are_written_in_shards(
    made: Callable[[Scheme], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = Scheme(4, 64)
    convert(made(scheme), tmp_path / "one", "gptq")
    monkeypatch.setattr(plan_module, "SHARD_BYTES", 60_000)
    convert(made(scheme), tmp_path / "many", "gptq")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    assert torch.equal(load(tmp_path / "many")(INPUT).logits, load(tmp_path / "one")(INPUT).logits)


def test_a_stopped_run_goes_on_and_ends_the_same(
    made: Callable[[Scheme], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(Scheme(4, 64))
    convert(source, tmp_path / "whole", "gptq")
    replace, count = durable.replace, 0

    def failing(old: Path, new: Path) -> None:
        nonlocal count
        count += 1
        if count == stop:
            raise OSError(28, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(durable, "replace", failing)
    for stop in (1, 2, 3):  # noqa: B007  (read by `failing`)
        count = 0
        with pytest.raises(OutputError, match="No space left"):
            convert(source, tmp_path / "stopped", "gptq")
        with pytest.raises(VerifyError, match="holds an unfinished run"):
            verify_checkpoint(tmp_path / "stopped")
    monkeypatch.setattr(durable, "replace", replace)
    convert(source, tmp_path / "stopped", "gptq")
    assert (tmp_path / "stopped" / "SHA256SUMS").read_bytes() == (tmp_path / "whole" / "SHA256SUMS").read_bytes()
    assert convert(source, tmp_path / "stopped", "gptq").files  # done already
    with pytest.raises(OutputError, match="finished checkpoint of another run"):
        convert(source, tmp_path / "stopped", "awq")


def test_verify_notices_what_changed(made: Callable[[Scheme], Path], tmp_path: Path) -> None:
    convert(made(Scheme(4, 64)), tmp_path / "out", "gptq")
    assert verify_checkpoint(tmp_path / "out") > 5
    data = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(data)
    with pytest.raises(VerifyError, match="its sha256 differs"):
        verify_checkpoint(tmp_path / "out")
