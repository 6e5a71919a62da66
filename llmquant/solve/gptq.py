"""GPTQ: quantize column by column, each column's error absorbed by the columns still to come.

Frantar et al., GPTQ, arXiv 2210.17323, with static activation order: the columns are visited by
falling diag(H), but every column keeps the group of its original place, so that no `g_idx` is
ever needed to read the result.
"""

import torch
from torch import Tensor

from llmquant.scheme import Quantized, Scheme, dequantize
from llmquant.solve.grid import search_grid
from llmquant.solve.hessian import Factor, inverse_factor

BLOCK = 128  # columns between two updates of the rest of the matrix


def quantize_gptq(W: Tensor, H: Tensor, scheme: Scheme) -> tuple[Quantized, Factor]:
    """Quantize `W` fp32 [m, n] against H = X^T X / k fp32 [n, n].

    Rows are independent: linears that share an input can be stacked and solved at once.
    Returns the codes in natural column order and the factor, which tells the damping that was used.
    """
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    factor = inverse_factor(H[order][:, order])
    importance = H.diagonal().clamp(min=0.0) + factor.damping * H.diagonal().mean().clamp(min=0.0)
    if factor.rung == "no activation":
        importance = torch.ones_like(importance)
    scales, zeros = search_grid(W, importance, scheme)
    codes = _round_columns(W, scales, zeros, factor.U, order, scheme)
    return Quantized(codes, scales, zeros), factor


def _round_columns(W: Tensor, scales: Tensor, zeros: Tensor, U: Tensor, order: Tensor, scheme: Scheme) -> Tensor:
    """Visit the columns of `W` in `order`; codes uint8 [m, n] in natural order.

    q_j = Q(w_j);  e = (w_j - q_j) / U_jj;  w_l -= e U_jl for l > j,
    at once inside a block of columns, and by one matrix product at its end for all later columns.
    """
    m, n = W.shape
    rest = W.T[order].contiguous()  # [n, m]: a column of W is one contiguous row
    codes = torch.empty(n, m, dtype=torch.uint8, device=W.device)
    group = order // scheme.width(n)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        block_scales = scales.T[group[start:end]].contiguous()
        block_zeros = zeros.T[group[start:end]].float()
        errors = torch.empty(end - start, m, device=W.device)
        block = rest[start:end]
        block_U = U[start:end, start:end]
        pivots = block_U.diagonal().tolist()
        for j in range(end - start):
            scale, zero, w = block_scales[j], block_zeros[j], block[j]
            code = torch.div(w, scale).round_().add_(zero).clamp_(0, scheme.max_code)
            codes[start + j] = code
            torch.sub(w, code.sub_(zero).mul_(scale), out=errors[j]).div_(pivots[j])
            block[j + 1 :].addr_(block_U[j, j + 1 :], errors[j], alpha=-1)
        rest[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    natural = torch.empty_like(codes)
    natural[order] = codes
    return natural.T.contiguous()


def relative_error(W: Tensor, q: Quantized, scheme: Scheme, H: Tensor) -> float:
    """||(W - Q) X||^2 / ||W X||^2 from the second moments alone: tr(D H D^T) / tr(W H W^T)."""
    difference = W - dequantize(q, scheme)
    return _energy(difference, H) / max(_energy(W, H), torch.finfo(torch.float32).tiny)


def _energy(W: Tensor, H: Tensor) -> float:
    return float((W @ H).mul_(W).sum(dtype=torch.float64))
