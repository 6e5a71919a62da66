"""transformers with optimum and gptqmodel loads our GPTQ checkpoints as we do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import TIED, compare_model, installed, prompts
from client_checks import IDS, TEXT, check_bf16, check_fp32, differing_weights, distance, logits, needs, real
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

pytestmark = needs("accelerate", "gptqmodel", "optimum")

DOWN = "re:.*down_proj"
EXACT: dict[str, dict[str, Any]] = {
    "g32": {"scheme": {"group_size": 32}},
    "g64": {"scheme": {"group_size": 64}},
    "g128": {"scheme": {"group_size": 128}},
    "gptq": {"scheme": {"group_size": 64}, "method": "gptq", "calibration": {"samples": 4, "seq_len": 64}},
    "skipped": {"scheme": {"group_size": 64}, "overrides": [{"match": "model.layers.0.mlp.down_proj", "skip": True}]},
    "biases": {"arch": "qwen2", "scheme": {"group_size": 64}},
}


def open_client(directory: Path, dtype: torch.dtype, backend: str = "gptq_torch") -> Any:
    """By default with the kernel in plain torch, which computes in the dtype of the model on every machine."""
    how = GPTQConfig(bits=4, backend=backend)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=how).eval()


@pytest.mark.parametrize("recipe", EXACT.values(), ids=EXACT)
def test_symmetric(quantized, recipe):
    directory = quantized(format="gptq", **recipe)
    check_fp32(open_client(directory, torch.float32), directory)
    check_bf16(open_client(directory, torch.bfloat16), directory)


def test_int8(quantized):
    """The client computes weights in the dtype of the scales: products of up to 15 bits, rounded to fp16."""
    directory = quantized(format="gptq", scheme={"bits": 8, "group_size": 64})
    client, ours = open_client(directory, torch.float32), real(directory)
    assert differing_weights(client, ours, stored=torch.float16) == []
    assert distance(logits(client, IDS), logits(ours, IDS)) < 2e-3
    check_bf16(open_client(directory, torch.bfloat16), directory)


def test_kernel_that_the_client_chooses(quantized):
    """The fastest for the processor; the client compiles some of them when they are first used, which takes minutes."""
    directory = quantized(format="gptq", scheme={"group_size": 64})
    check_bf16(open_client(directory, torch.bfloat16, backend="auto"), directory)


def test_several_schemes_are_refused_not_misread(quantized):
    """vLLM and SGLang follow the `dynamic` rules that describe them, transformers does not."""
    directory = quantized(format="gptq", scheme={"group_size": 64}, overrides=[{"match": DOWN, "group_size": 128}])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        open_client(directory, torch.float32)


def test_trained_model(quantized_smollm2):
    directory = quantized_smollm2("gptq")
    ids = AutoTokenizer.from_pretrained(directory)(TEXT, return_tensors="pt")["input_ids"]
    check_fp32(open_client(directory, torch.float32), directory, ids)
    check_bf16(open_client(directory, torch.bfloat16), directory, ids)


@pytest.mark.parametrize(("layout", "symmetric"), [("gptq", True), ("awq", False)])
def test_agreement(quantized_smollm2, table, layout, symmetric):
    directory = quantized_smollm2(layout, symmetric)
    client = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    found = compare_model(directory, client, prompts(directory))
    name = f"{layout}, {'symmetric' if symmetric else 'asymmetric'}"
    table.add(name, "transformers", installed("transformers", "gptqmodel", "optimum"), found)
    assert found.margin < TIED
