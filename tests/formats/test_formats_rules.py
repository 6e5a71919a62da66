"""The config blocks of other tools, as those tools write them."""

from typing import Any

import pytest

from llmquant.errors import CheckpointError
from llmquant.formats import for_config
from llmquant.scheme import Scheme

NAMES = ("self_attn.q_proj", "mlp.down_proj")
LINEARS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in NAMES] + ["lm_head"]
INSIDE = LINEARS[:-1]

BLOCKS: dict[str, tuple[dict[str, Any], dict[str, Scheme]]] = {
    "AutoGPTQ": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "static_groups": False, "sym": True,
         "damp_percent": 0.01, "true_sequential": True, "model_name_or_path": None, "is_marlin_format": False},
        dict.fromkeys(INSIDE, Scheme()),
    ),
    "GPTQModel": (
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False, "lm_head": True,
         "checkpoint_format": "gptq_v2", "format": "gptq_v2", "method": "gptq", "pack_dtype": "int32",
         "dynamic": {r"-:.*layers\.0\..*": {}, r"+:.*\.1\.mlp.*": {"bits": 8}},
         "meta": {"quantizer": ["gptqmodel:7.7.0"]}},
        {LINEARS[2]: Scheme(4, 64, False), LINEARS[3]: Scheme(8, 64, False), "lm_head": Scheme(4, 64, False)},
    ),
    "optimum": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
         "modules_in_block_to_quantize": [["self_attn.k_proj", "self_attn.q_proj"], ["mlp.up_proj"]]},
        {LINEARS[0]: Scheme(4, 32), LINEARS[2]: Scheme(4, 32)},
    ),
    "AutoAWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
         "modules_to_not_convert": None},
        dict.fromkeys(INSIDE, Scheme(symmetric=False)),
    ),
    "AutoAWQ, its own keys": (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM",
         "modules_to_not_convert": ["down_proj"]},
        {LINEARS[0]: Scheme(4, 64, False), LINEARS[2]: Scheme(4, 64, False)},
    ),
    "AutoRound": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 128,
         "sym": True, "data_type": "int", "autoround_version": "0.16.1", "block_name_to_quantize": "model.layers",
         "extra_config": {LINEARS[1]: {"bits": 8}, r".*layers\.1\.mlp.*": {"bits": 16, "data_type": "float"},
                          "lm_head": {"bits": 8, "group_size": 32}}},
        {LINEARS[0]: Scheme(), LINEARS[1]: Scheme(8), LINEARS[2]: Scheme(), "lm_head": Scheme(8, 32)},
    ),
    "AutoRound, in blocks": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 128,
         "sym": False, "block_name_to_quantize": ["model.layers.1"]},
        dict.fromkeys(LINEARS[2:4], Scheme(symmetric=False)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("block", "schemes"), BLOCKS.values(), ids=BLOCKS)
def test_what_is_quantized_and_how(block: dict[str, Any], schemes: dict[str, Scheme]) -> None:
    assert for_config(block).read_config(block, LINEARS) == schemes


@pytest.mark.parametrize(
    ("tool", "change", "message"),
    [
        ("AutoRound", {"data_type": "mx_fp"}, "data_type 'mx_fp'"),
        ("AutoRound", {"act_bits": 8}, "act_bits 8"),
        ("AutoRound", {"rotation_config": {"hadamard": True}}, "rotation_config"),
        ("AutoRound", {"extra_config": {"(": {}}}, r"extra_config: '\(' is no pattern"),
        ("GPTQModel", {"adapter": {"name": "lora"}}, "adapter"),
        ("AutoAWQ", {"bits": 5}, "bits: 5"),
        ("AutoAWQ", {"group_size": 16}, "group_size: 16"),
    ],
)
def test_what_cannot_be_held_is_named(tool: str, change: dict[str, Any], message: str) -> None:
    block = BLOCKS[tool][0] | change
    with pytest.raises(CheckpointError, match=rf"^config\.json: quantization_config: .*{message}"):
        for_config(block).read_config(block, LINEARS)
