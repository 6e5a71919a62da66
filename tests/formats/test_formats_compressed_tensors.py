"""compressed-tensors pack-quantized: golden words, exact round trips, and the configurations of other tools."""

import pytest
import torch
from formats_cases import SCHEMES, example, quantized
from hypothesis import given
from hypothesis import strategies as st

from llmquant.errors import CheckpointError, NumericsError, RecipeError
from llmquant.formats import FORMATS, compressed_tensors, for_config
from llmquant.scheme import Quantized, Scheme

BF16 = torch.bfloat16
LINEARS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")] + ["lm_head"]


def test_golden_words() -> None:
    tensors = compressed_tensors.pack("p", example(), Scheme(4, -1, symmetric=False), BF16)
    words = [0xECA86420, 0xFDB97531, 0x0ECA8642, 0x1FDB9753, 0x20ECA864, 0x31FDB975, 0x420ECA86, 0x531FDB97]
    assert (tensors["p.weight_packed"].long() % 2**32).flatten().tolist() == words
    assert tensors["p.weight_packed"].shape == (8, 1)
    assert (tensors["p.weight_zero_point"].long() % 2**32).tolist() == [[0xA9876543]]
    assert tensors["p.weight_shape"].tolist() == [8, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_goes_in_comes_out(scheme: Scheme, dtype: torch.dtype) -> None:
    q = quantized(scheme)
    m, n = q.codes.shape
    tensors = compressed_tensors.pack("p", q, scheme, dtype)
    specs = compressed_tensors.specs("p", m, n, scheme, dtype)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == specs
    assert list(tensors) == list(specs)
    assert all(t.is_contiguous() for t in tensors.values())
    assert ("p.weight_zero_point" in tensors) is not scheme.symmetric
    for before, after in zip(q, compressed_tensors.unpack("p", tensors, m, n, scheme), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 70), st.sampled_from([3, 4, 8]), st.booleans())
def test_any_shape_comes_back(m: int, groups: int, n: int, width: int, symmetric: bool) -> None:
    scheme, n = (Scheme(width, 32, symmetric), 32 * groups) if n % 2 else (Scheme(width, -1, symmetric), n)
    q = quantized(scheme, m, n)
    tensors = compressed_tensors.pack("p", q, scheme, BF16)
    after = compressed_tensors.unpack("p", tensors, m, n, scheme)
    assert all(torch.equal(a, b) for a, b in zip(q, after, strict=True))


def test_a_scale_that_the_model_dtype_would_change_is_refused() -> None:
    scheme = Scheme(4, 32)
    q = quantized(scheme)
    q.scales[2, 1] = 1 + 2**-9
    assert compressed_tensors.pack("p", q, scheme, torch.float16)
    with pytest.raises(NumericsError, match=r"p\.weight_scale: scale 1\.00195\d* at \[2, 1\]"):
        compressed_tensors.pack("p", q, scheme, BF16)


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"])
def test_a_malformed_tensor_is_named(leaf: str) -> None:
    scheme = Scheme(4, 32, symmetric=False)
    q = quantized(scheme)
    tensors = compressed_tensors.pack("p", q, scheme, BF16)
    tensors[f"p.{leaf}"] = tensors[f"p.{leaf}"].to(torch.int16)
    with pytest.raises(CheckpointError, match=rf"^p\.{leaf}: is torch\.int16"):
        compressed_tensors.unpack("p", tensors, *q.codes.shape, scheme)


def test_a_foreign_shape_is_refused() -> None:
    scheme = Scheme(4, 32)
    q = quantized(scheme)
    tensors = compressed_tensors.pack("p", q, scheme, BF16) | {"p.weight_shape": torch.tensor([1, 2])}
    with pytest.raises(CheckpointError, match=r"p\.weight_shape: is \[1, 2\]"):
        compressed_tensors.unpack("p", tensors, *q.codes.shape, scheme)


def test_refuse() -> None:
    assert compressed_tensors.refuse(7, 96, Scheme(4, 32)) is None
    assert compressed_tensors.refuse(7, 9, Scheme(4, -1)) is None
    assert compressed_tensors.refuse(8, 96, Scheme(4, 64)) == "group size 64 does not divide 96 columns"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_config_of_one_scheme(scheme: Scheme) -> None:
    schemes = dict.fromkeys(LINEARS[:3], scheme)
    block = compressed_tensors.config_block(schemes, LINEARS[3:])
    assert for_config(block) is FORMATS["compressed-tensors"] is compressed_tensors
    (group,) = block["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert block["ignore"] == LINEARS[3:]
    assert block.get("dequantize", False) is not scheme.symmetric
    assert compressed_tensors.read_config(block, LINEARS) == schemes


def test_config_of_mixed_schemes() -> None:
    schemes = {name: Scheme(4 + 4 * (i % 2), (32, -1)[i % 2]) for i, name in enumerate(LINEARS[:-1])}
    block = compressed_tensors.config_block(schemes, ["lm_head"])
    assert [group["targets"] for group in block["config_groups"].values()] == [LINEARS[0:4:2], LINEARS[1:4:2]]
    assert "dequantize" not in block
    assert compressed_tensors.read_config(block, LINEARS) == schemes


def foreign(**weights: object) -> dict[str, object]:
    """As llm-compressor writes it: a pattern for some, the class for the rest, patterns to ignore."""
    usual = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "actorder": "static",
    }
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*layers\\.1\\..*q_proj$"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": usual | weights},
            "group_1": {"targets": ["re:.*down_proj$"], "weights": eight, "format": "pack-quantized"},
        },
    }


def test_config_of_another_tool() -> None:
    found = compressed_tensors.read_config(foreign(), LINEARS)
    assert found == {LINEARS[0]: Scheme(4, 128), LINEARS[1]: Scheme(8, -1), LINEARS[3]: Scheme(8, -1)}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 5}, "bits: 5"),
        ({"group_size": 16}, "group_size: 16"),
        ({"type": "float"}, "type 'float'"),
        ({"strategy": "tensor"}, "strategy 'tensor'"),
        ({"actorder": "sideways"}, "actorder 'sideways'"),
        ({"symmetric": "yes"}, "'yes'"),
    ],
)
def test_config_that_cannot_be_read(weights: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json: quantization_config: .*{message}"):
        compressed_tensors.read_config(foreign(**weights), LINEARS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ignore": [{"name": "lm_head"}]}, r"\[\{'name': 'lm_head'\}\] is no list of names"),
        ({"ignore": "lm_head"}, "'lm_head' is no list of names"),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, "None is no list of names"),
        ({"config_groups": {"group_0": {"targets": [4]}}}, r"\[4\] is no list of names"),
        ({"config_groups": {"group_0": []}}, "config_groups: are no groups"),
        ({"config_groups": [{}]}, "config_groups: are no groups"),
    ],
)
def test_targets_that_are_none(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json: quantization_config: {message}"):
        compressed_tensors.read_config(foreign() | change, LINEARS)


def test_broken_pattern_and_other_layouts() -> None:
    with pytest.raises(CheckpointError, match=r"'re:\(' is no pattern"):
        compressed_tensors.read_config(foreign() | {"ignore": ["re:("]}, LINEARS)
    with pytest.raises(CheckpointError, match="format 'int-quantized'"):
        compressed_tensors.read_config(foreign() | {"format": "int-quantized"}, LINEARS)


@pytest.mark.parametrize("option", ["sparsity_config", "transform_config", "kv_cache_scheme"])
def test_more_than_packed_weights_is_refused_by_name(option: str) -> None:
    assert compressed_tensors.read_config(foreign() | {option: {}}, LINEARS)
    with pytest.raises(CheckpointError, match=rf"^config\.json: quantization_config: {option} is not supported"):
        compressed_tensors.read_config(foreign() | {option: {"format": "dense"}}, LINEARS)


def test_reordered_columns_of_older_files() -> None:
    scheme = Scheme(4, 32)
    q = quantized(scheme, 16, 64)
    tensors = compressed_tensors.pack("p", q, scheme, BF16)
    tensors["p.weight_g_idx"] = torch.arange(64, dtype=torch.int32) % 2
    order = compressed_tensors.order("p", tensors, 64, scheme)
    assert order is not None
    assert order.tolist() == [*range(0, 64, 2), *range(1, 64, 2)]
    assert torch.equal(compressed_tensors.unpack("p", tensors, 16, 64, scheme).codes, q.codes[:, order])
    with pytest.raises(RecipeError, match=r"^p: .*desc_act.*compressed-tensors cannot hold"):
        compressed_tensors.pack("p", q, scheme, BF16, order)


def test_shards_of_rows_stay_apart() -> None:
    """Rows are independent, so that servers may cut a weight between them without repacking."""
    scheme = Scheme(4, 32, symmetric=False)
    q = quantized(scheme, 16, 64)
    whole = compressed_tensors.pack("p", q, scheme, BF16)
    half = compressed_tensors.pack("p", Quantized(*(field[:8] for field in q)), scheme, BF16)
    assert torch.equal(whole["p.weight_packed"][:8], half["p.weight_packed"])
    assert torch.equal(whole["p.weight_zero_point"][:1], half["p.weight_zero_point"])
