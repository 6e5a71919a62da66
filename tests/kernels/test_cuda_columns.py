"""The fused loop of GPTQ on the emulated device, against its definition in torch."""

import ctypes

import pytest
import torch
from emulated_cuda import Columns, Emulator, guarded
from torch import Tensor

from llmquant.scheme import Scheme
from llmquant.solve import columns, grid


def problem(b: int, m: int) -> tuple[Tensor, Tensor]:
    """Columns [b, m], and the factor [b, b + 8] as a view that is not contiguous."""
    generator = torch.Generator().manual_seed(b + m)
    X = torch.randn(4 * b, b, generator=generator) @ (torch.eye(b) + 0.3 * torch.randn(b, b, generator=generator))
    H = X.T @ X / len(X) + 0.01 * torch.eye(b)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    return torch.randn(b, m, generator=generator) * 0.05, torch.cat((U, torch.full((b, 8), torch.nan)), 1)


def run(
    emulator: Emulator, work: Tensor, U: Tensor, scales: Tensor, zeros: Tensor, width: int, scheme: Scheme, search: bool
) -> tuple[Tensor, ...]:
    b, m = work.shape
    work, scales, zeros = guarded(work), guarded(scales), guarded(zeros)
    matrix = guarded(U)
    pivots, candidates = guarded(U.diagonal()[:b].reciprocal()), guarded(grid.candidates(scheme))
    codes = guarded(torch.full((b, m), 99, dtype=torch.uint8))
    tensors = work, matrix, pivots, scales, zeros, codes, candidates
    task = Columns(*(tensor.data_ptr() for tensor in tensors), len(candidates), m, b, U.shape[1], width)
    task.bits, task.symmetric = scheme.bits, scheme.symmetric
    if not search:
        task.candidates = None
    emulator.check("round_columns", ctypes.byref(task), None)
    return work, scales, zeros, codes


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 32, symmetric=False), Scheme(8, 32)], ids=str)
@pytest.mark.parametrize(("b", "width"), [(128, 128), (128, 1), (96, 32), (77, 7), (1, 1)])
def test_given_grids(emulator: Emulator, b: int, width: int, scheme: Scheme) -> None:
    m = 37
    work, U = problem(b, m)
    parts = [
        grid.minmax_grid(part.T.contiguous(), Scheme(scheme.bits, -1, scheme.symmetric)) for part in work.split(width)
    ]
    scales, zeros = torch.stack([s[:, 0] for s, _ in parts]), torch.stack([z[:, 0].float() for _, z in parts])
    wanted, codes = work.clone(), torch.zeros(b, m, dtype=torch.uint8)
    columns.round_columns(wanted, U, scales.clone(), zeros.clone(), codes, width, scheme, search=False)
    emulator.emulate(seed=b)
    errors, *grids, found = run(emulator, work, U, scales, zeros, width, scheme, search=False)
    assert torch.equal(grids[0], scales)
    assert torch.equal(grids[1], zeros)
    same = (found == codes).all(0)  # a rounding that is a tie but for fp32 changes all that follow in its row
    assert int(same.sum()) >= m - 1
    torch.testing.assert_close(errors[:, same], wanted[:, same], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 32, symmetric=False)], ids=str)
@pytest.mark.parametrize(("b", "width"), [(64, 32), (64, 64), (128, 128)])
def test_grids_are_searched_for(emulator: Emulator, b: int, width: int, scheme: Scheme) -> None:
    m = 34 if b == 64 else 8
    work, U = problem(b, m)
    scales, zeros = torch.empty(b // width, m), torch.empty(b // width, m)
    wanted, codes = work.clone(), torch.zeros(b, m, dtype=torch.uint8)
    columns.round_columns(wanted, U, scales, zeros, codes, width, scheme, search=True)
    emulator.emulate()
    nothing = torch.full_like(scales, torch.nan)
    errors, found_scales, found_zeros, found = run(
        emulator, work, U, nothing, nothing.clone(), width, scheme, search=True
    )
    same = (found == codes).all(0) & (found_scales == scales).all(0) & (found_zeros == zeros).all(0)
    assert int(same.sum()) >= m - 2  # candidates may lose as little as each other but for fp32
    torch.testing.assert_close(errors[:, same], wanted[:, same], rtol=1e-4, atol=1e-5)
    assert float(errors.square().sum()) < 1.001 * float(wanted.square().sum())
