"""ModelOpt W4A16_AWQ: golden bytes, and integers that an unpacker written from the definition gives back."""

import pytest
import torch
from formats_cases import quantized

from llmquant.errors import RecipeError
from llmquant.formats import modelopt
from llmquant.scheme import Quantized, Scheme, dequantize

BF16 = torch.bfloat16


def unpacked(weight: torch.Tensor) -> torch.Tensor:
    """int8 [m, n] of uint8 [m / 2, n]: nibbles in two's complement, even rows below."""
    rows = []
    for octets in weight.tolist():
        for shift in (0, 4):
            nibbles = [octet >> shift & 15 for octet in octets]
            rows.append([nibble - 16 if nibble > 7 else nibble for nibble in nibbles])
    return torch.tensor(rows)


def test_golden_bytes() -> None:
    codes = torch.tensor([[0, 1, -8], [7, -1, 0]]) + 8
    q = Quantized(codes.to(torch.uint8), torch.ones(2, 1), torch.full((2, 1), 8, dtype=torch.uint8))
    assert modelopt.pack("p", q, Scheme(4, 128), BF16)["p.weight"].tolist() == [[0x70, 0xF1, 0x08]]


@pytest.mark.parametrize("group_size", [64, 128])
def test_the_definition_gives_the_weight_back(group_size: int) -> None:
    scheme = Scheme(4, group_size)
    q = quantized(scheme)
    m, n = q.codes.shape
    tensors = modelopt.pack("a.o_proj", q, scheme, BF16)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == modelopt.specs("a.o_proj", m, n, scheme, BF16)
    scales = tensors["a.o_proj.weight_scale"].float().repeat_interleave(group_size, 1)
    weight = unpacked(tensors["a.o_proj.weight"]) * scales * tensors["a.o_proj.pre_quant_scale"].float()
    assert torch.equal(weight, dequantize(q, scheme))


def test_linears_that_the_engine_fuses_have_no_scale_of_their_own() -> None:
    for name, count in (("q_proj", 2), ("up_proj", 2), ("o_proj", 3), ("down_proj", 3)):
        assert len(modelopt.specs(f"layers.0.{name}", 8, 128, Scheme(), BF16)) == count


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme(8, 128), "4 bits without zero points, not int8"),
        (Scheme(4, 128, symmetric=False), "4 bits without zero points, not int4 g128 asymmetric"),
        (Scheme(4, 32), "groups are of 64 or 128 columns, not 32"),
        (Scheme(4, 64), None),
    ],
)
def test_refuse(scheme: Scheme, reason: str | None) -> None:
    found = modelopt.refuse(8, 128, scheme)
    assert found is None if reason is None else reason in str(found)


def test_config() -> None:
    block = modelopt.config_block({"a": Scheme(4, 64)}, ["lm_head"])
    assert block["quantization"]["quant_algo"] == "W4A16_AWQ"
    assert block["quantization"]["group_size"] == 64
    assert block["quantization"]["exclude_modules"] == ["lm_head"]
    with pytest.raises(RecipeError, match="one scheme, but linears have int4 g64 symmetric and int4 g128 symmetric"):
        modelopt.config_block({"a": Scheme(4, 64), "b": Scheme()}, [])
