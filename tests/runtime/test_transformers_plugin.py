"""`import llmquant`, and `from_pretrained` runs our kernels: for our checkpoints, or where it is asked to."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

import llmquant
from llmquant.errors import CheckpointError, NumericsError, RecipeError
from llmquant.pipeline import quantize
from llmquant.recipe import Override, Recipe
from llmquant.runtime.decode import Decoder
from llmquant.runtime.linear import QuantLinear
from llmquant.runtime.transformers_plugin import LlmquantConfig
from llmquant.scheme import Scheme

IDS = torch.arange(48).reshape(2, 24)
RECIPES = {
    "compressed-tensors": Recipe(method="rtn", scheme=Scheme(4, 32)),
    "asymmetric": Recipe(method="rtn", scheme=Scheme(4, 32, symmetric=False)),
    "3 bits": Recipe(method="rtn", scheme=Scheme(3, 32)),
    "gptq": Recipe(method="rtn", format="gptq", scheme=Scheme(4, 32)),
    "several": Recipe(method="rtn", scheme=Scheme(4, 32), overrides=(Override(match="re:.*down_proj", bits=8),)),
}
MIXTURES = ("mixtral", "qwen2_moe", "deepseek_v3")
OTHERS = [("gptq", "opt"), ("compressed-tensors", "mixtral")]


@pytest.fixture(scope="module")
def packed(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """`packed("gptq", "opt")`: a small checkpoint by one of RECIPES. Do not write into it."""
    made: dict[tuple[str, str], Path] = {}

    def make(recipe: str = "compressed-tensors", arch: str = "llama") -> Path:
        key = recipe, arch
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "model"
            quantize(make_checkpoint(arch=arch), made[key], RECIPES[recipe])
        return made[key]

    return make


def open_client(directory: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def quantized(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def stripped(directory: Path, target: Path) -> Path:
    """A copy that does not say who made it."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]["meta"]
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("first", ["llmquant", "transformers"])
def test_the_import_is_light_and_may_come_before_or_after_that_of_transformers(packed, first: str) -> None:
    second = {"llmquant": "transformers", "transformers": "llmquant"}[first]
    script = f"""
import sys
import {first}
if {first!r} == "llmquant":
    assert not set(sys.modules) & {{"torch", "transformers", "numpy"}}, "the import is not light"
else:
    from transformers import AutoModelForCausalLM
import {second}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(packed())!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "QuantLinear\n", done.stderr


@pytest.mark.parametrize(
    ("recipe", "arch"),
    [(recipe, "llama") for recipe in RECIPES]
    + [("compressed-tensors", arch) for arch in ("qwen2", "gemma3", "opt", "gpt_neox", *MIXTURES)],
)
def test_it_is_the_model_that_our_loader_makes(packed, recipe: str, arch: str) -> None:
    model, ours = open_client(packed(recipe, arch)), llmquant.load(packed(recipe, arch))
    assert quantized(model) == quantized(ours) != []
    assert torch.equal(logits(model), logits(ours))
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_names_are_left_alone_where_there_are_no_experts() -> None:
    from llmquant.runtime.transformers_plugin import LlmquantConfig, LlmquantQuantizer

    quantizer = LlmquantQuantizer(LlmquantConfig())
    assert quantizer.update_weight_conversions(["as it was"]) == ["as it was"]  # transformers before 5.2x
    assert quantizer.update_weight_conversions(["as it was"], None) == ["as it was"]


def test_single_tokens_pass_natively_where_they_do_in_our_loader(packed) -> None:
    model, ours = open_client(packed()), llmquant.load(packed())
    assert isinstance(model.model.forward, Decoder) == isinstance(ours.model.forward, Decoder)
    asked = {"attention_mask": torch.ones(1, 24), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS[:1], **asked), ours.generate(IDS[:1], **asked))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_is_that_of_the_activations(packed, dtype: torch.dtype) -> None:
    model = open_client(packed(), dtype=dtype)
    assert model.dtype == dtype
    assert torch.equal(logits(model), logits(llmquant.load(packed(), dtype)))


@pytest.mark.parametrize(("recipe", "arch"), OTHERS + [(recipe, "llama") for recipe in RECIPES])
def test_saving_writes_the_bytes_that_were_read(packed, tmp_path: Path, recipe: str, arch: str) -> None:
    open_client(packed(recipe, arch)).save_pretrained(tmp_path)
    before, after = load_file(packed(recipe, arch) / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    blocks = [
        json.loads((d / "config.json").read_text())["quantization_config"] for d in (packed(recipe, arch), tmp_path)
    ]
    assert blocks[0] == blocks[1]
    assert torch.equal(logits(open_client(tmp_path)), logits(open_client(packed(recipe, arch))))


def test_the_checkpoints_of_others_load_as_before(packed, tmp_path: Path) -> None:
    model = open_client(stripped(packed(), tmp_path / "other"))
    assert quantized(model) == []
    assert model.hf_quantizer.quantization_config.quant_method == "compressed-tensors"


def test_another_package_can_be_asked_for(packed) -> None:
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = open_client(packed(), quantization_config=CompressedTensorsConfig())
    assert quantized(model) == []


def test_ours_can_be_asked_for(packed, tmp_path: Path) -> None:
    other = stripped(packed(), tmp_path / "other")
    model = open_client(other, quantization_config=LlmquantConfig(precision="int8"))
    assert {module.precision for module in model.modules() if isinstance(module, QuantLinear)} == {"int8"}
    assert torch.equal(logits(model), logits(llmquant.load(other, precision="int8")))


def test_a_layout_that_we_cannot_read_is_refused_by_name(packed, tmp_path: Path) -> None:
    other = stripped(packed(), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quant_method 'hqq' is not supported"):
        open_client(other, quantization_config=LlmquantConfig())


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda tensors, name: tensors.pop(name), CheckpointError, "weight_scale is missing"),
        (lambda tensors, name: tensors[name].fill_(float("nan")), NumericsError, "weight_scale: nan"),
    ],
    ids=["missing", "not finite"],
)
def test_a_damaged_tensor_is_refused_by_name(packed, tmp_path: Path, edit: Any, error: Any, message: str) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(packed(), damaged)
    tensors = load_file(damaged / "model.safetensors")
    edit(tensors, "model.layers.1.mlp.up_proj.weight_scale")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=f"model.layers.1.mlp.up_proj.{message}"):
        open_client(damaged)


def test_what_cannot_be_done_is_refused(packed) -> None:
    with pytest.raises(RecipeError, match="device_map: packed weights cannot be offloaded"):
        open_client(packed(), device_map={"model": "cpu", "lm_head": "disk"})
    with pytest.raises(RecipeError, match="precision: 'fp4' is none"):
        LlmquantConfig(precision="fp4")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu(packed) -> None:
    model = open_client(packed(), device_map="cuda")
    assert {module.codes.device.type for module in model.modules() if isinstance(module, QuantLinear)} == {"cuda"}
    with torch.inference_mode():
        found = model(IDS.cuda()).logits.float().cpu()
    exact = logits(llmquant.load(packed(), torch.float32))
    assert float((found - exact).norm() / exact.norm()) < 0.02
