"""verify against damage: what loaders accept without a word, it names."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import relist
from safetensors.torch import load_file, save_file

from llmquant.errors import VerifyError
from llmquant.manifest import LOG, MANIFEST, read_manifest
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.verify import verify_checkpoint

SINGLE = "model.safetensors"
FLIPS = 200


@pytest.fixture(scope="module", params=["compressed-tensors", "gptq"])
def finished(
    request: pytest.FixtureRequest, model: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    quantize(model, out, recipe.model_copy(update={"format": request.param}))
    return out


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def retensor(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, {"format": "pt"})


def test_a_copy_is_as_good_as_the_original(damaged: Path) -> None:
    assert verify_checkpoint(damaged) == len(read_manifest(damaged)) + 2


def test_every_single_flipped_bit_is_found(damaged: Path) -> None:
    rng = random.Random(0)
    files = sorted(path for path in damaged.iterdir() if path.is_file())
    sizes = [path.stat().st_size for path in files]
    found = 0
    for n in range(FLIPS):
        # every file gets its share, the small ones, too: half of the flips go by file, half by size
        path = files[n % len(files)] if n % 2 else rng.choices(files, sizes)[0]
        data = bytearray(path.read_bytes())
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        original = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(VerifyError):
            verify_checkpoint(damaged)
        path.write_bytes(original)
        found += 1
    assert found == FLIPS
    verify_checkpoint(damaged)


@pytest.mark.parametrize("kind", ["packed", "scale", "norm", "embedding"])
def test_a_removed_tensor_is_named_even_if_the_manifest_was_adjusted(damaged: Path, kind: str) -> None:
    pattern = {
        "packed": ("q_proj.weight_packed", "q_proj.qweight"),
        "scale": ("down_proj.weight_scale", "down_proj.scales"),
        "norm": ("input_layernorm.weight",),
        "embedding": ("embed_tokens.weight",),
    }[kind]
    name = next(name for name in sorted(load_file(damaged / SINGLE)) if name.endswith(pattern))
    retensor(damaged, lambda tensors: tensors.pop(name))
    relist(damaged)
    with pytest.raises(VerifyError, match=f"tensor {name} is missing"):
        verify_checkpoint(damaged)


def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in sorted(tensors) if n.endswith((".weight_scale", ".scales")))
        tensors[name][0, 0] = value

    return change


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "nan"), (float("inf"), "inf"), (0.0, "scale of zero")])
def test_scales_that_are_no_scales(damaged: Path, value: float, words: str) -> None:
    retensor(damaged, spoil(value))
    relist(damaged)
    with pytest.raises(VerifyError, match=words):
        verify_checkpoint(damaged)


def test_a_tensor_of_the_wrong_shape(damaged: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()

    retensor(damaged, cut)
    relist(damaged)
    with pytest.raises(VerifyError, match=r"tensor model\.norm\.weight is .*expected"):
        verify_checkpoint(damaged)


def test_a_recipe_that_promises_something_else(damaged: Path) -> None:
    path = damaged / "llmquant_recipe.yaml"
    path.write_text(path.read_text().replace("bits: 4", "bits: 8"))
    relist(damaged)
    with pytest.raises(VerifyError, match="but the recipe promises int8"):
        verify_checkpoint(damaged)


@pytest.mark.parametrize("name", [MANIFEST, LOG, "config.json", SINGLE, "tokenizer.json", "llmquant_recipe.yaml"])
def test_a_removed_file(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    with pytest.raises(VerifyError, match=name):
        verify_checkpoint(damaged)


def test_a_weight_file_that_nobody_listed(damaged: Path) -> None:
    shutil.copy(damaged / SINGLE, damaged / "extra.safetensors")
    with pytest.raises(VerifyError, match=r"extra\.safetensors is not listed"):
        verify_checkpoint(damaged)


def test_swapped_shards(model: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmquant.plan.SHARD_BYTES", 20_000)
    out = tmp_path / "out"
    quantize(model, out, recipe)
    first, second, *_ = sorted(out.glob("model-*.safetensors"))
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    with pytest.raises(VerifyError, match="its sha256 differs"):
        verify_checkpoint(out)
    relist(out)
    with pytest.raises(VerifyError, match=r"model\.safetensors\.index\.json"):
        verify_checkpoint(out)


def test_an_unfinished_directory(finished: Path, damaged: Path) -> None:
    (damaged / ".llmquant").mkdir()
    with pytest.raises(VerifyError, match="unfinished run"):
        verify_checkpoint(damaged)


def test_a_directory_that_llmquant_did_not_make(model: Path) -> None:
    with pytest.raises(VerifyError, match="llmquant did not finish this directory"):
        verify_checkpoint(model)


def test_the_manifest_is_for_sha256sum(finished: Path) -> None:
    import subprocess

    done = subprocess.run(["sha256sum", "-c", MANIFEST], cwd=finished, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert json.loads((finished / "config.json").read_text())["quantization_config"]
