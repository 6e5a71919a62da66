"""Cuts through packed tensors: what a rank gets is the packed form of its part of the weight."""

import re

import pytest
import torch
from torch import Tensor

from llmquant.formats import FORMATS
from llmquant.formats.sharding import axes, refuse_cut
from llmquant.scheme import Quantized, Scheme

M, N = 64, 256
CASES = [
    (layout, scheme)
    for layout in FORMATS
    for scheme in (Scheme(4, 32), Scheme(4, 64, symmetric=False), Scheme(4, -1), Scheme(8, 64), Scheme(3, 32))
    if FORMATS[layout].refuse(M, N, scheme) is None
]


def weight(scheme: Scheme) -> Quantized:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, scheme.max_code + 1, (M, N), generator=generator, dtype=torch.uint8)
    scales = 2.0 ** torch.randint(-8, 0, (M, scheme.groups(N)), generator=generator)
    zeros = torch.randint(1, scheme.max_code, scales.shape, generator=generator, dtype=torch.uint8)
    return Quantized(codes, scales, torch.full_like(zeros, scheme.midpoint) if scheme.symmetric else zeros)


def part(tensor: Tensor, axis: int | None, rank: int, ranks: int) -> Tensor:
    return tensor if axis is None else tensor.chunk(ranks, axis)[rank]


@pytest.mark.parametrize(("layout", "scheme"), CASES, ids=str)
@pytest.mark.parametrize("cut", ["rows", "columns"])
def test_a_part_of_the_packed_tensors_is_the_packed_part(layout: str, scheme: Scheme, cut: str) -> None:
    q, ranks, form = weight(scheme), 2, FORMATS[layout]
    m, n = (M // ranks, N) if cut == "rows" else (M, N // ranks)
    assert refuse_cut(form, scheme, [m], n, N) is None
    packed = form.pack("", q, scheme, torch.bfloat16)
    for rank in range(ranks):
        if cut == "rows":
            own = Quantized(*(tensor.chunk(ranks)[rank] for tensor in q))
        else:
            grids = (part(grid, 1 if grid.shape[1] > 1 else None, rank, ranks) for grid in q[1:])
            own = Quantized(q.codes.chunk(ranks, 1)[rank], *grids)
        expected = form.pack("", own, scheme, torch.bfloat16)
        for name, along in axes(form, scheme).items():
            assert torch.equal(part(packed[name], getattr(along, cut), rank, ranks), expected[name]), name


@pytest.mark.parametrize(
    ("layout", "scheme", "rows", "columns", "reason"),
    [
        ("compressed-tensors", Scheme(4, 64), [64], 96, "96 columns on each rank are no multiple of the group size 64"),
        ("compressed-tensors", Scheme(4, -1), [64], 20, "20 columns on each rank end inside a word of weight_packed"),
        ("compressed-tensors", Scheme(4, 32, symmetric=False), [64, 12], N, "12 rows .* word of weight_zero_point"),
        ("gptq", Scheme(4, 32), [12], N, "12 rows on each rank end inside a word of qzeros"),
        ("awq", Scheme(4, 32), [12], N, "12 rows on each rank end inside a word of qweight"),
    ],
)
def test_a_cut_through_a_group_or_a_word_is_refused(layout, scheme, rows, columns, reason) -> None:
    found = refuse_cut(FORMATS[layout], scheme, rows, columns, N)
    assert found is not None
    assert re.search(reason, found)


def test_symmetric_rows_may_be_cut_anywhere_where_no_zero_points_are_packed() -> None:
    assert refuse_cut(FORMATS["compressed-tensors"], Scheme(4, 32), [5], N, N) is None
