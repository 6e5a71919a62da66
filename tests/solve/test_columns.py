"""The native loops against their definition in torch, on every instruction set that this machine has."""

import pytest
import torch

from llmquant.native import LIBRARY, Library
from llmquant.scheme import Scheme
from llmquant.solve import columns, grid, native

if not LIBRARY.is_file():
    pytest.skip("the native library was not built", allow_module_level=True)

NATIVE = Library()
LEVELS = range(len(NATIVE.levels))
SCHEMES = [Scheme(bits, 32, symmetric) for bits in (3, 4, 8) for symmetric in (True, False)]
SHAPES = [(64, 1), (64, 37), (128, 70), (96, 16)]  # (columns, rows): rows beside and beyond whole tiles


def problem(b: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns [b, m], an upper triangular factor inside a wider matrix, and a Hessian, likewise."""
    generator = torch.Generator().manual_seed(b + m)
    X = torch.randn(4 * b, b + 9, generator=generator) * (0.5 + torch.rand(b + 9, generator=generator))
    H = X.T @ X / len(X)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True).contiguous()
    return torch.randn(b, m, generator=generator) * 0.05, U, H


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_library", lambda work: None)


@pytest.mark.parametrize("level", LEVELS, ids=NATIVE.levels)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("search", [True, False])
def test_rounding(scheme: Scheme, shape: tuple[int, int], level: int, search: bool, in_torch: None) -> None:
    work, U, _ = problem(*shape)
    b, m = shape
    scales, zeros = columns.search_columns(work, torch.ones(b), 32, scheme)
    given = (work.clone(), scales.clone(), zeros.clone(), torch.empty(b, m, dtype=torch.uint8))
    mine = tuple(tensor.clone() for tensor in given)
    columns.round_columns(given[0], U, *given[1:], 32, scheme, search=search)
    tried = grid.candidates(scheme) if search else None
    pivots = U.diagonal()[:b].reciprocal()
    native.round_columns(NATIVE, mine[0], U, pivots, *mine[1:], 32, scheme, tried, level=level)
    same = given[3] == mine[3]
    # One code that falls to the other side changes all that follow in its row: compare rows, and their losses.
    assert same.all(0).float().mean() > (0.5 if search or m == 1 else 0.9)
    loss, expected = mine[0].square().sum(0), given[0].square().sum(0)
    assert torch.allclose(loss, expected, rtol=0.3)
    assert float(loss.sum()) == pytest.approx(float(expected.sum()), rel=0.02 if m > 1 else 0.3)


@pytest.mark.parametrize("level", LEVELS, ids=NATIVE.levels)
@pytest.mark.parametrize("width", [3, 30, 50])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_group_of_any_width(scheme: Scheme, width: int, level: int, in_torch: None) -> None:
    """A whole row is one group, and may end inside of what the loop takes together."""
    work, U, _ = problem(width, 37)
    given = (work.clone(), torch.empty(1, 37), torch.empty(1, 37), torch.empty(width, 37, dtype=torch.uint8))
    mine = tuple(tensor.clone() for tensor in given)
    columns.round_columns(given[0], U, *given[1:], width, scheme, search=True)
    pivots = U.diagonal()[:width].reciprocal()
    native.round_columns(NATIVE, mine[0], U, pivots, *mine[1:], width, scheme, grid.candidates(scheme), level=level)
    same = (mine[1] == given[1]) & (mine[2] == given[2])
    assert same.float().mean() > 0.8  # two grids may lose the same but for the last bit
    assert torch.allclose(mine[0].square().sum(0), given[0].square().sum(0), rtol=1e-3)


@pytest.mark.parametrize("level", LEVELS, ids=NATIVE.levels)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_descent(scheme: Scheme, shape: tuple[int, int], level: int, in_torch: None) -> None:
    W, _, H = problem(*shape)
    b, _ = shape
    scales, zeros = columns.search_columns(W, torch.ones(b), 32, scheme)
    wide = scales.repeat_interleave(32, 0), zeros.repeat_interleave(32, 0)
    codes = grid.round_to(W, *wide, scheme)
    gradients = H[:b, :b] @ (W - grid.value_of(codes, *wide))
    given = (gradients.clone(), codes.to(torch.uint8))
    mine = tuple(tensor.clone() for tensor in given)
    columns.descend_columns(given[0], H, scales, zeros, given[1], 32, scheme)
    pivots = H.diagonal()[:b].reciprocal()
    native.round_columns(
        NATIVE, mine[0], H, pivots, scales, zeros, mine[1], 32, scheme, descend=True, level=level
    )  # fmt: skip
    assert (given[1] == mine[1]).float().mean() > 0.99
    assert (given[1] != codes).any()


@pytest.mark.parametrize("level", LEVELS, ids=NATIVE.levels)
@pytest.mark.parametrize("width", [32, 48, 96])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_search(scheme: Scheme, width: int, level: int, in_torch: None) -> None:
    scheme = Scheme(scheme.bits, -1, scheme.symmetric)
    W, _, _ = problem(96, 37)
    weight = torch.rand(96, generator=torch.Generator().manual_seed(0))
    groups = zip(W.split(width), weight.split(width), strict=True)
    parts = [columns.search_columns(*group, width, scheme) for group in groups]
    expected = torch.cat([s for s, _ in parts]), torch.cat([z for _, z in parts])
    scales, zeros = torch.empty_like(expected[0]), torch.empty_like(expected[1])
    tried = grid.candidates(scheme)
    native.search_grids(NATIVE, W, weight.sqrt(), scales, zeros, width, scheme, tried, level=level)
    # two grids may lose the same but for the last bit
    assert ((scales == expected[0]) & (zeros == expected[1])).float().mean() > 0.95


def test_rows_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    W, U, _ = problem(128, 300)
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        work, codes = W.clone(), torch.empty(128, 300, dtype=torch.uint8)
        grids = torch.empty(4, 300), torch.empty(4, 300)
        columns.round_columns(work, U, *grids, codes, 32, Scheme(4, 32), search=True)
        results.append((work, *grids, codes))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sizes_are_checked_before_native_code_trusts_them() -> None:
    W, U, _ = problem(64, 8)
    grids, codes = (torch.empty(2, 8), torch.empty(2, 8)), torch.empty(64, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="work"):
        columns.round_columns(W.double(), U, *grids, codes, 32, Scheme(4, 32), search=False)
    with pytest.raises(ValueError, match="scales"):
        columns.round_columns(W, U, grids[0][:1], grids[1], codes, 32, Scheme(4, 32), search=False)
    with pytest.raises(ValueError, match="codes"):
        columns.round_columns(W, U, *grids, codes[:, :4], 32, Scheme(4, 32), search=False)
