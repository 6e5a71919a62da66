"""Checkpoints of other tools load as the weights that their layouts define."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import awq_tensors, gptq_tensors, rewrite, rounded
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant.errors import CheckpointError
from llmquant.inspect import inspect_checkpoint
from llmquant.runtime.linear import QuantLinear
from llmquant.runtime.loader import load

INPUT = torch.arange(48).reshape(2, 24)
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AUTOROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False}

# name -> (config block, version of GPTQ or 0 for AWQ, bits, symmetric, act-order, g_idx written)
TOOLS: dict[str, tuple[dict[str, Any], int, int, bool, bool, bool]] = {
    "AutoGPTQ": (GPTQ | {"is_marlin_format": False}, 1, 4, False, False, True),
    "AutoGPTQ desc_act": (GPTQ | {"desc_act": True, "sym": True}, 1, 4, True, True, True),
    "GPTQModel v2 desc_act": (GPTQ | {"desc_act": True, "checkpoint_format": "gptq_v2"}, 2, 4, False, True, True),
    "GPTQModel int8": (GPTQ | {"bits": 8, "sym": True, "format": "gptq"}, 1, 8, True, False, True),
    "AutoAWQ": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
                0, 4, False, False, False),
    "AutoRound as gptq": (AUTOROUND | {"packing_format": "auto_round:auto_gptq"}, 1, 4, False, False, False),
    "AutoRound, zero points as they are": (AUTOROUND | {"packing_format": "auto_round"}, 2, 4, False, False, False),
    "AutoRound as awq": (AUTOROUND | {"packing_format": "auto_round:auto_awq"}, 0, 4, False, False, False),
}  # fmt: skip


@pytest.fixture(params=TOOLS)
def foreign(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of each tool, and the weights that it means."""
    block, version, bits, symmetric, act_order, with_groups = TOOLS[request.param]
    generator = np.random.default_rng(0)

    def change(name: str, W: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        groups = np.arange(W.shape[1]) // 32
        if act_order:
            groups = generator.permutation(groups)
        q, meaning = rounded(W, groups, bits=bits, symmetric=symmetric)
        if version:
            return gptq_tensors(q, groups, bits, version=version, with_groups=with_groups), meaning
        return awq_tensors(q), meaning

    return tmp_path / "foreign", rewrite(tiny_checkpoint, tmp_path / "foreign", block, change)


def test_every_linear_multiplies_by_the_weight_that_the_file_means(foreign: tuple[Path, dict[str, Tensor]]) -> None:
    directory, meanings = foreign
    model = load(directory, torch.float32)
    assert len(meanings) == 14
    with torch.inference_mode():
        for name, W in meanings.items():
            linear = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(linear, QuantLinear)
            assert torch.allclose(linear(torch.eye(W.shape[1])).T, W, atol=1e-4 * float(W.abs().max()))


def test_logits_generation_and_saving(
    foreign: tuple[Path, dict[str, Tensor]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    directory, meanings = foreign
    model: Any = load(directory, torch.float32)
    dense: Any = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    dense.load_state_dict(meanings, strict=False)
    with torch.inference_mode():
        ours, theirs = model(INPUT).logits, dense(INPUT).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3
    prompt: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(1, 24)}
    assert torch.equal(model.generate(INPUT[:1], **prompt), dense.generate(INPUT[:1], **prompt))
    model.save_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "saved", torch.float32)(INPUT).logits, ours)


def test_inspect(foreign: tuple[Path, dict[str, Tensor]]) -> None:
    facts = inspect_checkpoint(foreign[0])
    assert facts["quantized_linears"] == 14
    assert 4.4 < facts["bits_per_weight"] < 8.9


def test_zero_points_of_the_other_version_are_noticed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A symmetric file whose config does not say that it is version 2."""

    def change(name: str, W: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        groups = np.arange(W.shape[1]) // 32
        q, meaning = rounded(W, groups, bits=4, symmetric=True)
        return gptq_tensors(q, groups, 4, version=2), meaning

    rewrite(tiny_checkpoint, tmp_path / "foreign", GPTQ | {"sym": True}, change)
    with pytest.raises(CheckpointError, match=r"qzeros: holds zero point 9, but config\.json says symmetric \(8\)"):
        load(tmp_path / "foreign")
