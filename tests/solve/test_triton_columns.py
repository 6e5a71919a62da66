"""The loops in Triton against their definition in torch; in Triton's interpreter where there is no GPU."""

import pytest
import torch
from torch import Tensor

from llmquant.scheme import Scheme
from llmquant.solve import columns, grid

triton = pytest.importorskip("llmquant.solve.triton", reason="needs Triton", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEMES = [Scheme(4, 32), Scheme(4, 32, symmetric=False), Scheme(3, 32), Scheme(8, 32, symmetric=False)]


@pytest.fixture(autouse=True)
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition is itself, and not one of the loops that take its place."""
    monkeypatch.setattr(columns, "_library", lambda work: None)
    monkeypatch.setattr(columns, "_gpu_loop", lambda *_, **__: None)


def problem(b: int, m: int) -> tuple[Tensor, Tensor]:
    """Columns [b, m], and an upper triangular factor inside a wider matrix."""
    generator = torch.Generator().manual_seed(b + m)
    X = torch.randn(4 * b, b + 9, generator=generator) * (0.5 + torch.rand(b + 9, generator=generator))
    U = torch.linalg.cholesky(torch.linalg.inv(X.T @ X / len(X)), upper=True).contiguous()
    return (torch.randn(b, m, generator=generator) * 0.05).to(DEVICE), U.to(DEVICE)


def expect_same(given: tuple[Tensor, ...], mine: tuple[Tensor, ...]) -> None:
    """Work, scales, zeros, codes: to the rounding of fp32, but for rows in which a code fell to the other side."""
    same = (given[3] == mine[3]).all(0) & (given[1] == mine[1]).all(0)
    assert same.float().mean() > 0.95
    torch.testing.assert_close(mine[0][:, same], given[0][:, same], rtol=1e-4, atol=1e-5)
    assert torch.equal(mine[2][:, same], given[2][:, same])


@pytest.mark.parametrize(("b", "m"), [(64, 1), (100, 37), (128, 70)])
@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=str)
def test_rounding_on_given_grids(scheme: Scheme, b: int, m: int) -> None:
    work, U = problem(b, m)
    whole, ones = Scheme(scheme.bits, -1, scheme.symmetric), torch.ones(b, device=DEVICE)
    fits = [columns.search_columns(part, ones[: len(part)], len(part), whole) for part in work.split(32)]
    scales, zeros = (torch.cat(parts) for parts in zip(*fits, strict=True))
    given = (work.clone(), scales, zeros, torch.empty(b, m, dtype=torch.uint8, device=DEVICE))
    mine = tuple(tensor.clone() for tensor in given)
    columns.round_columns(given[0], U, *given[1:], 32, scheme, search=False)
    triton.round_columns(mine[0], U, U.diagonal()[:b].reciprocal(), *mine[1:], 32, scheme)
    expect_same(given, mine)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_grids_chosen_in_the_loop(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups: the second one finds the errors of the first. Of some grids: the interpreter takes its time."""
    few = grid.candidates(scheme)[::16]
    monkeypatch.setattr(grid, "candidates", lambda _: few)
    work, U = problem(24, 17)
    given = (work.clone(), *torch.empty(2, 2, 17, device=DEVICE), torch.empty(24, 17, dtype=torch.uint8, device=DEVICE))
    mine = tuple(tensor.clone() for tensor in given)
    columns.round_columns(given[0], U, *given[1:], 12, scheme, search=True)
    triton.round_columns(mine[0], U, U.diagonal()[:24].reciprocal(), *mine[1:], 12, scheme, few)
    expect_same(given, mine)


def test_ties_are_rounded_to_even_and_scales_to_eight_bits() -> None:
    """Weights in the middle between two codes, and a scale that has too many bits."""
    scheme = Scheme(4, 32)
    work = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 100.0, -100.0], device=DEVICE).view(1, -1)
    one = torch.ones(1, 7, device=DEVICE)
    codes = torch.empty(1, 7, dtype=torch.uint8, device=DEVICE)
    triton.round_columns(work.clone(), one[:, :1], one[0, :1], one, 8 * one, codes, 1, scheme)
    assert codes.tolist() == [[8, 10, 10, 8, 6, 15, 0]]
    odd, U = torch.full((1, 3), 0.123456789, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    found = torch.empty(1, 3, device=DEVICE), torch.empty(1, 3, device=DEVICE)
    triton.round_columns(odd.clone(), U, U[0], *found, codes[:, :3].clone(), 1, scheme, grid.candidates(scheme)[:1])
    assert torch.equal(found[0], grid.representable(found[0]))
