"""GPTQ, both versions: golden words, exact round trips, and what it must refuse."""

import pytest
import torch
from formats_cases import SCHEMES, example, quantized

from llmquant.errors import CheckpointError, NumericsError, RecipeError
from llmquant.formats import FORMATS, for_config
from llmquant.formats.gptq import V1 as gptq
from llmquant.formats.gptq import V2, Gptq
from llmquant.scheme import Scheme

BF16 = torch.bfloat16
LINEARS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")] + ["lm_head"]


def test_golden_words() -> None:
    tensors = gptq.pack("p", example(), Scheme(4, -1, symmetric=False), BF16)
    words = [0xECA86420, 0xFDB97531, 0x0ECA8642, 0x1FDB9753, 0x20ECA864, 0x31FDB975, 0x420ECA86, 0x531FDB97]
    assert (tensors["p.qweight"].long() % 2**32).tolist() == [words]
    assert tensors["p.qzeros"].tolist() == [[-1737075662]]
    assert V2.pack("p", example(), Scheme(4, -1, symmetric=False), BF16)["p.qzeros"].tolist() == [[-1450744509]]


def test_golden_words_of_3_bits() -> None:
    """32 codes in three words, two of them across a border."""
    scheme = Scheme(3, 32)
    codes = (torch.arange(32) % 8).to(torch.uint8).expand(32, 32)
    q = quantized(scheme, 32, 32)._replace(codes=codes)
    words = gptq.pack("p", q, scheme, BF16)["p.qweight"][:, 0].long() % 2**32
    assert words.tolist() == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]


@pytest.mark.parametrize(("width", "word"), [(4, 2004318071), (8, 2139062143)])
def test_symmetric_zero_points_are_the_words_that_other_tools_write(width: int, word: int) -> None:
    scheme = Scheme(width, 32)
    assert set(gptq.pack("p", quantized(scheme), scheme, BF16)["p.qzeros"].flatten().tolist()) == {word}


@pytest.mark.parametrize("version", [gptq, V2], ids=lambda version: version.NAME)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_goes_in_comes_out(scheme: Scheme, version: Gptq) -> None:
    q = quantized(scheme, m=32, lowest_zero=version.less)
    m, n = q.codes.shape
    tensors = version.pack("p", q, scheme, BF16)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == version.specs("p", m, n, scheme, BF16)
    assert list(tensors) == list(version.specs("p", m, n, scheme, BF16))
    assert all(t.is_contiguous() for t in tensors.values())
    assert version.order("p", tensors, n, scheme) is None
    for before, after in zip(q, version.unpack("p", tensors, m, n, scheme), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


def test_zero_point_zero_is_refused_by_name() -> None:
    scheme = Scheme(4, 32, symmetric=False)
    q = quantized(scheme, lowest_zero=1)
    q.zeros[3, 1] = 0
    with pytest.raises(RecipeError, match=r"^a\.b\.qzeros: row 3, group 1 .*; use --sym"):
        gptq.pack("a.b", q, scheme, BF16)


def test_a_scale_that_fp16_would_change_is_refused() -> None:
    scheme = Scheme(4, 32)
    q = quantized(scheme)
    q.scales[2, 1] = 1 + 2**-12
    with pytest.raises(NumericsError, match=r"p\.scales: scale 1\.000\d+ at \[1, 2\]"):
        gptq.pack("p", q, scheme, BF16)


def test_zero_points_that_contradict_the_scheme_are_refused() -> None:
    scheme = Scheme(4, 32)
    q = quantized(scheme)
    tensors = gptq.pack("p", q, scheme, BF16)
    with pytest.raises(CheckpointError, match=r"^p\.qzeros: holds zero point 7, but config\.json says symmetric"):
        V2.unpack("p", tensors, *q.codes.shape, scheme)


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_tensor_of_another_shape_is_named(leaf: str) -> None:
    scheme = Scheme(4, 32)
    tensors = gptq.pack("p", quantized(scheme), scheme, BF16)
    m, n = quantized(scheme).codes.shape
    tensors[f"p.{leaf}"] = tensors[f"p.{leaf}"][:-1]
    with pytest.raises(CheckpointError, match=rf"^p\.{leaf}: "):
        gptq.unpack("p", tensors, m, n, scheme)


def test_reordered_columns_come_back_sorted_by_group() -> None:
    scheme = Scheme(4, 32)
    q = quantized(scheme)
    m, n = q.codes.shape
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    order = order.view(-1, 32).sort().values.flatten()  # within a group, columns keep their order
    tensors = gptq.pack("p", q, scheme, BF16, order)
    for group, columns in enumerate(order.view(-1, 32)):
        assert set(tensors["p.g_idx"][columns].tolist()) == {group}
    found = gptq.order("p", tensors, n, scheme)
    assert found is not None
    assert torch.equal(found, order)
    assert all(torch.equal(a, b) for a, b in zip(q, gptq.unpack("p", tensors, m, n, scheme), strict=True))


def test_files_without_groups_of_columns_have_them_in_place() -> None:
    scheme = Scheme(4, 32)
    q = quantized(scheme)
    tensors = gptq.pack("p", q, scheme, BF16)
    del tensors["p.g_idx"]
    assert gptq.order("p", tensors, 256, scheme) is None
    assert torch.equal(gptq.unpack("p", tensors, *q.codes.shape, scheme).codes, q.codes)


def test_groups_of_several_sizes_are_refused() -> None:
    scheme = Scheme(4, 32)
    tensors = gptq.pack("p", quantized(scheme), scheme, BF16)
    tensors["p.g_idx"][40] = 0
    with pytest.raises(CheckpointError, match=r"^p\.g_idx: its groups are not all of 32 columns"):
        gptq.order("p", tensors, 256, scheme)


@pytest.mark.parametrize(
    ("m", "n", "scheme", "reason"),
    [
        (8, 64, Scheme(4, 64), None),
        (9, 64, Scheme(4, 64), "multiple of 8"),
        (8, 60, Scheme(4, -1), "multiple of 8"),
        (12, 60, Scheme(8, -1), None),
        (8, 96, Scheme(4, 64), "does not divide 96"),
        (16, 64, Scheme(3, 64), "multiple of 32"),
        (32, 64, Scheme(3, 64), None),
    ],
)
def test_refuse(m: int, n: int, scheme: Scheme, reason: str | None) -> None:
    found = gptq.refuse(m, n, scheme)
    assert found is None if reason is None else reason in str(found)


def test_config_of_one_scheme() -> None:
    schemes = dict.fromkeys(LINEARS[:-1], Scheme(4, 64))
    block = gptq.config_block(schemes, ["lm_head"])
    assert for_config(block) is FORMATS["gptq"] is gptq
    assert for_config(V2.config_block(schemes, [])) is FORMATS["gptq_v2"] is V2
    assert {key: block[key] for key in ("bits", "group_size", "sym", "desc_act", "lm_head")} == {
        "bits": 4, "group_size": 64, "sym": True, "desc_act": False, "lm_head": False,
    }  # fmt: skip
    assert block["checkpoint_format"] == block["format"] == "gptq"
    assert block["modules_in_block_to_quantize"] == [[name] for name in schemes]
    assert list(block["dynamic"]) == [r"-:^lm_head$"]
    assert gptq.read_config(block, LINEARS) == schemes


def test_config_of_mixed_schemes_and_skips() -> None:
    schemes = {name: Scheme(4, 128) for name in LINEARS[:3]} | {"lm_head": Scheme(8, -1)}
    block = gptq.config_block(schemes, [LINEARS[3]])
    assert block["dynamic"] == {
        r"-:^model\.layers\.1\.mlp\.down_proj$": {},
        r"+:^lm_head$": {"bits": 8, "group_size": -1, "sym": True},
    }
    assert gptq.read_config(block, LINEARS) == schemes


def test_rules_that_all_parts_of_a_fused_linear_share_hold_for_the_whole() -> None:
    parts = [f"layers.0.attn.{name}_proj" for name in "qkvo"]
    schemes = dict.fromkeys(parts[:3], Scheme(8, 32)) | {
        parts[3]: Scheme(),
        "a.0.b": Scheme(),
        "a.1.b": Scheme(),
        "a.2.b": Scheme(),
    }
    rules = gptq.config_block(schemes, ["layers.0.mlp.gate_proj"])["dynamic"]
    assert rules[r"+:^layers\.0\.attn\.qkv_proj$"] == {"bits": 8, "group_size": 32, "sym": True}
    assert not any("gate_up_proj" in rule for rule in rules)


def test_config_of_another_tool() -> None:
    block = {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True,
        "dynamic": {"-:.*down": {}, r".*\.1\..*": {"bits": 8}},
    }  # fmt: skip
    assert gptq.read_config(block, LINEARS) == {LINEARS[0]: Scheme(4, 128), LINEARS[2]: Scheme(8, 128)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 2}, "bits: 2"),
        ({"is_marlin_format": True}, "is_marlin_format True"),
        ({"pack_dtype": "int64"}, "pack_dtype 'int64'"),
        ({"group_size": "128"}, "'128'"),
        ({"dynamic": {"-:(": {}}}, r"dynamic: '\(' is no pattern"),
    ],
)
def test_config_that_cannot_be_read(change: dict[str, object], message: str) -> None:
    block = gptq.config_block({LINEARS[0]: Scheme()}, []) | change
    with pytest.raises(CheckpointError, match=rf"^config\.json: quantization_config: .*{message}"):
        gptq.read_config(block, LINEARS)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        ({"quant_method": "gptq", "format": "gptq_p"}, "format 'gptq_p' is not supported"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv' is not supported"),
        ({"quant_method": "auto-round", "packing_format": "mlx"}, "packing_format 'mlx' is not supported"),
    ],
)
def test_layouts_that_are_not_ours_are_named(block: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json: quantization_config: {message}"):
        for_config(block)
