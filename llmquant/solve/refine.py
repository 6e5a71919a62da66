"""After the rounding: better scales for given integers, and better integers for given scales.

Both lower the loss of each row, tr(E H E^T) with E = W - Q, or leave the row as it was.
"""

import torch
from torch import Tensor

from llmquant.scheme import MIN_SCALE, Quantized, Scheme, dequantize
from llmquant.solve.columns import BLOCK, descend_columns
from llmquant.solve.grid import representable

REFIT_ROWS = 256  # at a time: what one group's products with all columns take stays in cache
RIDGE = 1e-6  # of the mean diagonal of the normal equations: keeps an all-zero group solvable


def refit_scales(W: Tensor, H: Tensor, q: Quantized, scheme: Scheme) -> Quantized:
    """The scales that fit the integers best, by the normal equations of each row (arXiv 2602.02126).

        N t = Z^T H e,    N = Z^T H Z,    s' = s + t

    with e = w - Z s, and Z [n, G] the row's integers v = code - zero, each in the column of its group. Scales are
    rounded to what servers hold before a row is judged, and only rows that gain by it change.
    """
    parts = zip(*(part.split(REFIT_ROWS) for part in (W, *q)), strict=True)
    return q._replace(scales=torch.cat([_refit_rows(W, H, Quantized(*rest), scheme) for W, *rest in parts]))


def _refit_rows(W: Tensor, H: Tensor, q: Quantized, scheme: Scheme) -> Tensor:
    m, n = W.shape
    width, G = scheme.width(n), scheme.groups(n)
    v = q.codes.float() - q.zeros.repeat_interleave(width, 1)
    lower = W.new_zeros(m, G, G)
    for g, start in enumerate(range(0, n, width)):
        products = v[:, start : start + width] @ H[start : start + width, start:]
        lower[:, g:, g] = products.mul_(v[:, start:]).view(m, -1, width).sum(-1)
    normal = lower + lower.tril(-1).mT
    right = ((W - dequantize(q, scheme)) @ H).mul_(v).view(m, G, width).sum(-1)
    ridge = RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    factor, _ = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge.expand(m, G)))
    solved = q.scales + torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    usable = torch.isfinite(solved) & (solved.abs() >= MIN_SCALE) & (solved.sign() == q.scales.sign())
    scales = torch.where(usable, representable(solved), q.scales)
    t = scales - q.scales
    gain = (t * (2 * right - (normal @ t.unsqueeze(-1)).squeeze(-1))).sum(1, keepdim=True)
    return torch.where(gain > 0, scales, q.scales)


def descend(W: Tensor, H: Tensor, q: Quantized, scheme: Scheme) -> Quantized:
    """One pass of coordinate descent over the integers: each column to its best codes, all others fixed.

    (QuantEase, arXiv 2309.01885; CDQuant, arXiv 2406.17542.)
    """
    n = W.shape[1]
    width = scheme.width(n)
    codes = q.codes.T.contiguous()
    E = (W - dequantize(q, scheme)).T
    gradients = H @ E
    before = (E * gradients).sum(0)
    group = torch.arange(n, device=W.device) // width
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        own = group[start:end]
        scales, zeros = q.scales.T[own].contiguous(), q.zeros.T[own].float().contiguous()
        steps = gradients[start:end].clone()
        descend_columns(steps, H[start:, start:], scales, zeros, codes[start:end], 1, scheme)
        gradients.addmm_(H[:, start:end], steps, alpha=-1)
    moved = q._replace(codes=codes.T.contiguous())
    after = ((W - dequantize(moved, scheme)).T * gradients).sum(0)
    return q._replace(codes=torch.where((after < before).unsqueeze(1), moved.codes, q.codes))


def refine(W: Tensor, H: Tensor, q: Quantized, scheme: Scheme, passes: int) -> Quantized:
    """Scales and integers in turn."""
    for _ in range(passes):
        q = descend(W, H, refit_scales(W, H, q, scheme), scheme)
    return q
