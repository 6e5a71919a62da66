"""transformers with the compressed-tensors package loads our compressed-tensors checkpoints as we do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import TIED, compare_model, installed, prompts
from client_checks import (
    FP32_ROUNDING,
    IDS,
    TEXT,
    RealLinear,
    check_bf16,
    check_fp32,
    differing_weights,
    distance,
    logits,
    needs,
    real,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmquant.model.experts import Experts
from llmquant.runtime.loader import load

pytestmark = needs("compressed_tensors")

DOWN = "re:.*down_proj"
FIRST_ATTENTION = "re:.*layers\\.0\\.self_attn.*"
SYMMETRIC: dict[str, dict[str, Any]] = {
    "g32": {"scheme": {"group_size": 32}},
    "g64": {"scheme": {"group_size": 64}},
    "g128": {"scheme": {"group_size": 128}},
    "channel": {"scheme": {"group_size": -1}},
    "int8": {"scheme": {"bits": 8, "group_size": 64}},
    "gptq": {"scheme": {"group_size": 64}, "method": "gptq", "calibration": {"samples": 4, "seq_len": 64}},
    "mixed groups": {
        "scheme": {"group_size": 64},
        "overrides": [{"match": DOWN, "group_size": 128}, {"match": FIRST_ATTENTION, "group_size": 32}],
    },
    "mixed bits": {"scheme": {"group_size": 64}, "overrides": [{"match": DOWN, "bits": 8}]},
    "skipped": {"scheme": {"group_size": 64}, "overrides": [{"match": "model.layers.0.mlp.down_proj", "skip": True}]},
    "biases": {"arch": "qwen2", "scheme": {"group_size": 64}},
}
ASYMMETRIC: dict[str, dict[str, Any]] = {
    "g64": {"scheme": {"group_size": 64, "symmetric": False}},
    "channel": {"scheme": {"group_size": -1, "symmetric": False}},
    "skipped": {"scheme": {"group_size": 64, "symmetric": False}, "overrides": [{"match": DOWN, "skip": True}]},
}
MIXED_ASYMMETRIC: dict[str, dict[str, Any]] = {
    "bits": {"match": DOWN, "bits": 8},
    "groups": {"match": DOWN, "group_size": 128},
    "symmetry": {"match": DOWN, "symmetric": True},
}


def open_client(directory: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@pytest.mark.parametrize("recipe", SYMMETRIC.values(), ids=SYMMETRIC)
def test_symmetric(quantized, recipe):
    directory = quantized(**recipe)
    check_fp32(open_client(directory, torch.float32), directory)
    check_bf16(open_client(directory, torch.bfloat16), directory)


@pytest.mark.parametrize("recipe", ASYMMETRIC.values(), ids=ASYMMETRIC)
def test_asymmetric(quantized, recipe):
    """Here the client computes weights in the dtype of the scales: products of up to 12 bits, rounded to bf16."""
    directory = quantized(**recipe)
    client, ours = open_client(directory, torch.float32), real(directory)
    assert differing_weights(client, ours, stored=torch.bfloat16) == []
    exact = logits(ours, IDS)
    noise = distance(logits(load(directory, torch.bfloat16), IDS), exact)
    assert distance(logits(client, IDS), exact) < noise
    check_bf16(open_client(directory, torch.bfloat16), directory)


@pytest.mark.parametrize("overrides", MIXED_ASYMMETRIC.values(), ids=MIXED_ASYMMETRIC)
def test_several_schemes_with_zero_points_are_refused_not_misread(quantized, overrides):
    """transformers cannot read these files. Told to dequantize, it would take the first scheme for all linears."""
    directory = quantized(scheme={"group_size": 64, "symmetric": False}, overrides=[overrides])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        open_client(directory, torch.float32)


@pytest.mark.parametrize("overrides", [[], [{"match": r"re:.*\.[qkv]_proj", "bits": 8}]], ids=["one scheme", "two"])
@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3", "hy_v3"])
def test_mixtures_of_experts(quantized, arch, overrides):
    """The client keeps experts in the dtype of the scales, whatever was asked for, and computes them in it."""
    if overrides and arch == "deepseek_v3":
        overrides = [{"match": r"re:.*\.q_b_proj", "bits": 8}]
    directory = quantized(arch=arch, scheme={"group_size": 32}, overrides=overrides)
    client, ours = open_client(directory, torch.float32), real(directory)
    for name, experts in [(name, module) for name, module in ours.named_modules() if isinstance(module, Experts)]:
        for linear in experts.modules():
            if isinstance(linear, RealLinear):
                linear.weight.data = linear.weight.bfloat16().float()
        theirs = client.get_submodule(name)
        gate_up = [torch.cat([expert.gate_proj.weight, expert.up_proj.weight]) for expert in experts]
        assert torch.equal(theirs.gate_up_proj, torch.stack(gate_up).bfloat16())
        assert torch.equal(theirs.down_proj, torch.stack([expert.down_proj.weight for expert in experts]).bfloat16())
        theirs.gate_up_proj.data, theirs.down_proj.data = theirs.gate_up_proj.float(), theirs.down_proj.float()
    client.set_experts_implementation("eager")
    assert distance(logits(client, IDS), logits(ours, IDS)) < FP32_ROUNDING


def test_asymmetric_experts_are_refused_not_misread(quantized):
    directory = quantized(arch="qwen3_moe", scheme={"group_size": 32, "symmetric": False})
    with pytest.raises(RuntimeError):
        open_client(directory, torch.float32)


def test_trained_model(quantized_smollm2):
    directory = quantized_smollm2("compressed-tensors")
    ids = AutoTokenizer.from_pretrained(directory)(TEXT, return_tensors="pt")["input_ids"]
    check_fp32(open_client(directory, torch.float32), directory, ids)
    check_bf16(open_client(directory, torch.bfloat16), directory, ids)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_agreement(quantized_smollm2, table, symmetric):
    directory = quantized_smollm2("compressed-tensors", symmetric)
    found = compare_model(directory, open_client(directory, torch.bfloat16), prompts(directory))
    name = f"compressed-tensors, {'symmetric' if symmetric else 'asymmetric'}"
    table.add(name, "transformers", installed("transformers", "compressed-tensors"), found)
    assert found.margin < TIED
