"""GPTQ on a GPU, by each of the loops that may serve there, against GPTQ on the CPU in torch."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from llmquant.native import CUDA_LIBRARY, GPU_BACKENDS, CudaLibrary
from llmquant.scheme import Scheme, dequantize
from llmquant.solve import columns
from llmquant.solve.gptq import ORDERS, quantize_gptq
from llmquant.solve.hessian import inverse_factor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


@pytest.fixture(params=GPU_BACKENDS)
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "cuda" and not CUDA_LIBRARY.is_file():
        pytest.skip(f"{CUDA_LIBRARY.name} was not built")
    if request.param == "cuda":
        from llmquant.solve import cuda

        own = partial(cuda.round_columns, CudaLibrary())
    else:
        own = pytest.importorskip("llmquant.solve.triton").round_columns
    monkeypatch.setattr(columns, "_gpu_loop", lambda work, *_, **__: own if work.is_cuda else None)
    monkeypatch.setattr(columns, "_library", lambda work: None)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(4, 32, symmetric=False), Scheme(3, 64)], ids=str)
def test_the_same_weight_but_for_rounding(scheme: Scheme, order: str, loop: None) -> None:
    m, n = 70, 512
    generator = torch.Generator().manual_seed(0)
    X, W = torch.randn(2048, n, generator=generator) * torch.linspace(0.1, 3, n), torch.randn(m, n, generator=generator)
    H = X.T @ X / len(X)
    factor = inverse_factor(H, ORDERS[order](H.diagonal(), scheme.width(n)), grouped=order == "group")
    moved = replace(factor, U=factor.U.cuda(), order=factor.order.cuda())
    mine = quantize_gptq(W.cuda(), moved, H.diagonal().cuda(), scheme)
    expected = quantize_gptq(W, factor, H.diagonal(), scheme)
    # One code that falls to the other side changes all that follow in its row: compare rows, and losses.
    assert (mine.codes.cpu() == expected.codes).all(1).float().mean() > 0.5
    losses = [
        float((((W - dequantize(q, scheme)) @ H) * (W - dequantize(q, scheme))).sum())
        for q in (type(mine)(*(part.cpu() for part in mine)), expected)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
