"""Loading: the same model as transformers makes of the same numbers, or a refusal that names the tensor."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmquant.errors import CheckpointError, NumericsError
from llmquant.kernels.layout import unpack
from llmquant.pipeline import quantize
from llmquant.recipe import Override, Recipe
from llmquant.runtime.linear import QuantLinear
from llmquant.runtime.loader import load
from llmquant.scheme import Quantized, Scheme, dequantize

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt_neox"]
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3"]
SCHEME = Scheme(4, 32)
INPUT = torch.arange(48).reshape(2, 24)
EXACT = 1e-3  # what the products leave of an error at the logits; bf16 leaves ten times as much
MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def make_packed(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """`make_packed(recipe, arch=...)`: a quantized checkpoint. Do not write into it."""
    made: dict[str, Path] = {}

    def make(recipe: Recipe, **options: Any) -> Path:
        key = f"{recipe!r} {options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed")
            quantize(make_checkpoint(**options), made[key], recipe)
        return made[key]

    return make


def rtn(format: str = "compressed-tensors", scheme: Scheme = SCHEME, **options: Any) -> Recipe:
    return Recipe(method="rtn", format=format, scheme=scheme, **options)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(INPUT).logits


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y - exact).norm() / exact.norm())


def real_weight(linear: QuantLinear) -> Tensor:
    q = unpack(linear.packed, linear.out_features, linear.in_features, linear.scheme)
    return dequantize(q, linear.scheme)


def dense_twin(packed: PreTrainedModel, original: Path) -> PreTrainedModel:
    """The original with every packed weight put in as real numbers."""
    twin = load(original, torch.float32)
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            twin.get_submodule(name).weight.data = real_weight(module)
    return twin


@pytest.mark.parametrize("arch", FAMILIES + MIXTURES)
def test_an_unquantized_checkpoint_is_what_transformers_loads(make_checkpoint: MakeCheckpoint, arch: str) -> None:
    source = make_checkpoint(arch=arch)
    model, expected = load(source), AutoModelForCausalLM.from_pretrained(source).eval()
    assert not model.training
    assert model.dtype == model.config.dtype == torch.bfloat16
    model.set_attn_implementation(expected.config._attn_implementation)  # ours rounds differently
    if arch in MIXTURES:
        expected.set_experts_implementation("eager")  # the others add up in other orders
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize(
    ("format", "arch"),
    [
        *itertools.product(["compressed-tensors", "gptq", "awq"], FAMILIES),
        *itertools.product(["compressed-tensors"], MIXTURES),
    ],
)
def test_a_packed_checkpoint_is_the_dense_model_of_its_weights(
    make_packed: MakeCheckpoint, make_checkpoint: MakeCheckpoint, arch: str, format: str
) -> None:
    scheme = Scheme(4, 32, symmetric=format != "awq")
    model = load(make_packed(rtn(format, scheme), arch=arch), torch.float32)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) >= 8
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    found, expected = logits(model), logits(dense_twin(model, make_checkpoint(arch=arch)))
    if arch in MIXTURES:  # a token whose experts are nearly tied goes elsewhere: it, and those that attend to it
        errors = (found - expected).norm(dim=-1) / expected.norm()
        found, expected = found[errors < EXACT], expected[errors < EXACT]
        assert len(found) > 0.6 * errors.numel()
    assert relative_error(found, expected) < EXACT


def test_the_weights_are_those_that_the_file_means(make_packed: MakeCheckpoint) -> None:
    """Independently of this package's unpacking: shifts on the words of the file."""
    packed = make_packed(rtn(scheme=Scheme(4, 32, symmetric=False)))
    model, tensors = load(packed, torch.float32), load_file(packed / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    shifts = 4 * torch.arange(8)
    codes = (tensors[f"{name}.weight_packed"].long()[..., None] >> shifts & 15).flatten(1)
    zeros = (tensors[f"{name}.weight_zero_point"].long()[:, None, :] >> shifts[:, None] & 15).flatten(0, 1)
    scales = tensors[f"{name}.weight_scale"].float()
    q = Quantized(codes.to(torch.uint8), scales, zeros.to(torch.uint8))
    expected = dequantize(q, Scheme(4, 32, symmetric=False))
    assert torch.equal(real_weight(model.get_submodule(name)), expected)


def test_mixed_schemes_and_skipped_linears(make_packed: MakeCheckpoint, make_checkpoint: MakeCheckpoint) -> None:
    overrides = (
        Override(match=r"re:.*\.mlp\.down_proj", bits=8, group_size=-1),
        Override(match="model.layers.0.self_attn.o_proj", skip=True),
    )
    for format in ("compressed-tensors", "gptq"):
        model = load(make_packed(rtn(format, overrides=overrides)), torch.float32)
        assert model.get_submodule("model.layers.1.mlp.down_proj").scheme == Scheme(8, -1)
        assert isinstance(model.get_submodule("model.layers.0.self_attn.o_proj"), nn.Linear)
        assert model.get_submodule("model.layers.1.self_attn.o_proj").scheme == Scheme(4, 32)
        assert relative_error(logits(model), logits(dense_twin(model, make_checkpoint()))) < EXACT


def test_tied_embeddings_stay_one_tensor(make_packed: MakeCheckpoint) -> None:
    model = load(make_packed(rtn(), tied=1))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert logits(model).isfinite().all()


def test_generation_uses_the_settings_of_the_checkpoint(make_packed: MakeCheckpoint, tmp_path: Path) -> None:
    directory = shutil.copytree(make_packed(rtn()), tmp_path / "packed")
    settings = {"eos_token_id": [2, 7], "pad_token_id": 0, "max_new_tokens": 3}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    model: Any = load(directory)
    assert model.generation_config.eos_token_id == [2, 7]
    assert model.generate(INPUT[:1], do_sample=False).shape[1] <= INPUT.shape[1] + 3
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: cannot be read"):
        load(directory)


def rewrite(directory: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint in a single file, with other tensors."""
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_both_conventions_for_the_prefix(make_packed: MakeCheckpoint, tmp_path: Path) -> None:
    packed = make_packed(rtn(), tied=1)

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    assert torch.equal(logits(load(rewrite(packed, tmp_path / "stripped", strip))), logits(load(packed)))


@pytest.mark.parametrize(
    ("format", "leaf"),
    [("compressed-tensors", leaf) for leaf in ("weight_packed", "weight_scale", "weight_shape")]
    + [("gptq", leaf) for leaf in ("qweight", "qzeros", "scales")],
)
def test_a_missing_part_of_a_weight_is_refused(
    make_packed: MakeCheckpoint, tmp_path: Path, format: str, leaf: str
) -> None:
    name = f"model.layers.1.self_attn.k_proj.{leaf}"
    broken = rewrite(make_packed(rtn(format)), tmp_path / "broken", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"broken: tensor {name} is missing from every shard"):
        load(broken)


def test_a_missing_norm_is_refused(make_packed: MakeCheckpoint, tmp_path: Path) -> None:
    broken = rewrite(make_packed(rtn()), tmp_path / "broken", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is missing"):
        load(broken)


def test_a_scale_that_is_not_finite_is_refused(make_packed: MakeCheckpoint, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale"
    broken = rewrite(make_packed(rtn()), tmp_path / "broken", lambda tensors: tensors[name][3].fill_(torch.nan))
    with pytest.raises(NumericsError, match=rf"{name}: nan at index \[3, 0\]"):
        load(broken)


def test_a_shape_that_config_does_not_ask_for_is_refused(make_packed: MakeCheckpoint, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()

    with pytest.raises(CheckpointError, match=r"lm_head\.weight: shape \(511, 64\), but config\.json asks for"):
        load(rewrite(make_packed(rtn()), tmp_path / "broken", cut))


@pytest.mark.parametrize(
    ("format", "arch"),
    [
        *itertools.product(["compressed-tensors", "gptq", "awq"], ["llama", "phi3", "opt", "gpt_neox"]),
        *itertools.product(["compressed-tensors"], MIXTURES),
    ],
)
def test_what_is_saved_is_what_was_loaded(make_packed: MakeCheckpoint, tmp_path: Path, arch: str, format: str) -> None:
    scheme = Scheme(3 if format == "compressed-tensors" else 4, 32, symmetric=format == "gptq")
    packed = make_packed(rtn(format, scheme), arch=arch)
    model = load(packed)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    before, after = load_file(packed / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_state_dict_can_be_loaded(make_packed: MakeCheckpoint) -> None:
    model, other = load(make_packed(rtn(), arch="opt")), load(make_packed(rtn(), arch="opt"))
    for module in other.modules():
        if isinstance(module, QuantLinear):
            module.codes.zero_()
            module.bias.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
