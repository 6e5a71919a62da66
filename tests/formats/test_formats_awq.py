"""AWQ: golden words, exact round trips, and what it must refuse."""

import pytest
import torch
from formats_cases import SCHEMES, example, quantized

from llmquant.errors import CheckpointError, RecipeError
from llmquant.formats import FORMATS, awq, for_config
from llmquant.scheme import Scheme

BF16 = torch.bfloat16
FOUR = [scheme for scheme in SCHEMES if scheme.bits == 4]
LINEARS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")] + ["lm_head"]


def test_golden_words() -> None:
    tensors = awq.pack("p", example(), Scheme(4, -1, symmetric=False), BF16)
    words = [0x75316420, 0x97538642, 0xB975A864, 0xDB97CA86, 0xFDB9ECA8, 0x1FDB0ECA, 0x31FD20EC, 0x531F420E]
    assert (tensors["p.qweight"].long() % 2**32).flatten().tolist() == words
    assert tensors["p.qzeros"].tolist() == [[-1469802669]]


@pytest.mark.parametrize("scheme", FOUR, ids=str)
def test_what_goes_in_comes_out(scheme: Scheme) -> None:
    q = quantized(scheme)
    m, n = q.codes.shape
    tensors = awq.pack("p", q, scheme, BF16)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == awq.specs("p", m, n, scheme, BF16)
    assert all(t.is_contiguous() for t in tensors.values())
    for before, after in zip(q, awq.unpack("p", tensors, m, n, scheme), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


def test_each_nibble_is_where_the_definition_has_it() -> None:
    scheme = Scheme(4, 32, symmetric=False)
    q = quantized(scheme)
    qweight = awq.pack("p", q, scheme, BF16)["p.qweight"].tolist()
    for column, words in enumerate(qweight):
        for word, value in enumerate(words):
            for nibble, row in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                assert value >> 4 * nibble & 15 == q.codes[8 * word + row, column]


def test_zero_points_that_contradict_the_scheme_are_refused() -> None:
    q = quantized(Scheme(4, 32, symmetric=False))
    tensors = awq.pack("p", q, Scheme(4, 32, symmetric=False), BF16)
    with pytest.raises(CheckpointError, match=r"^p\.qzeros: holds zero point 0, but config\.json says symmetric"):
        awq.unpack("p", tensors, *q.codes.shape, Scheme(4, 32))


@pytest.mark.parametrize(
    ("m", "n", "scheme", "reason"),
    [
        (8, 64, Scheme(4, 64), None),
        (12, 64, Scheme(4, 64), "12 rows are not a multiple of 8"),
        (8, 96, Scheme(4, 64), "does not divide 96"),
        (8, 64, Scheme(8, 64), "4 bits, not 8"),
    ],
)
def test_refuse(m: int, n: int, scheme: Scheme, reason: str | None) -> None:
    found = awq.refuse(m, n, scheme)
    assert found is None if reason is None else reason in str(found)


def test_reordered_columns_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^a\.b: its columns are reordered \(desc_act\), which awq cannot hold"):
        awq.pack("a.b", quantized(Scheme()), Scheme(), BF16, torch.arange(256).flip(0))


@pytest.mark.parametrize("scheme", FOUR, ids=str)
def test_config(scheme: Scheme) -> None:
    schemes = dict.fromkeys(LINEARS[:3], scheme)
    block = awq.config_block(schemes, LINEARS[3:])
    assert for_config(block) is FORMATS["awq"] is awq
    assert block["version"] == "gemm"
    assert block["zero_point"] is True
    assert block["modules_to_not_convert"] == LINEARS[3:]
    assert awq.read_config(block, LINEARS) == schemes


def test_several_schemes_are_refused() -> None:
    schemes = {LINEARS[0]: Scheme(4, 64, False), LINEARS[1]: Scheme(4, 128, False)}
    with pytest.raises(RecipeError, match=r"awq holds one scheme, but linears get int4 g64 .* and int4 g128"):
        awq.config_block(schemes, [])


def test_a_name_to_skip_inside_of_another_is_refused() -> None:
    """Loaders look for parts of names: `mlp.gate` would skip `mlp.gate_proj`, too."""
    with pytest.raises(RecipeError, match=r"layers\.0\.mlp\.gate is a part of layers\.0\.mlp\.gate_proj"):
        awq.config_block({"layers.0.mlp.gate_proj": Scheme()}, ["layers.0.mlp.gate"])
