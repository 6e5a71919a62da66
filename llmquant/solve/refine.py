"""After the rounding: better scales for given integers, and better integers for given scales.

Both lower the loss of each row, tr(E H E^T) with E = W - Q, or leave the row as it was.
"""

import torch
from torch import Tensor

from llmquant.scheme import MIN_SCALE, Quantized, Scheme, dequantize
from llmquant.solve.columns import BLOCK, descend_columns
from llmquant.solve.grid import representable

RIDGE = 1e-6  # of the mean diagonal of the normal equations: keeps an all-zero group solvable


def row_losses(W: Tensor, q: Quantized, scheme: Scheme, H: Tensor) -> Tensor:
    """tr(E H E^T) row by row, fp32 [m]."""
    E = W - dequantize(q, scheme)
    return (E @ H).mul_(E).sum(1)


def refit_scales(W: Tensor, H: Tensor, q: Quantized, scheme: Scheme) -> Quantized:
    """The scales that fit the integers best, by the normal equations of each row (arXiv 2602.02126).

        (Z^T H Z) s = Z^T H w,    Z [n, G] holds a row's integers v = code - zero, each in the column of its group

    Scales are rounded to what servers hold before a row is judged, and only rows that gain by it change.
    """
    m, n = W.shape
    G = scheme.groups(n)
    v = q.codes.float() - q.zeros.repeat_interleave(scheme.width(n), 1).float()
    grouped = v.view(m, G, -1)
    WH = (W @ H).view(m, G, -1)
    normal = W.new_empty(m, G, G)
    for g in range(G):  # one group's products with all columns at a time: [m, n] and not [m, G, n]
        rows = slice(g * scheme.width(n), (g + 1) * scheme.width(n))
        normal[:, g] = (grouped[:, g] @ H[rows]).view(m, G, -1).mul_(grouped).sum(-1)
    right = (grouped * WH).sum(-1)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    solved = torch.linalg.solve_ex(normal, right.unsqueeze(-1))[0].squeeze(-1)
    usable = torch.isfinite(solved) & (solved.abs() >= MIN_SCALE) & (solved.sign() == q.scales.sign())
    refit = q._replace(scales=torch.where(usable, representable(solved), q.scales))
    return _better_rows(W, H, q, refit, scheme)


def descend(W: Tensor, H: Tensor, q: Quantized, scheme: Scheme) -> Quantized:
    """One pass of coordinate descent over the integers: each column to its best codes, all others fixed.

    (QuantEase, arXiv 2309.01885; CDQuant, arXiv 2406.17542.)
    """
    n = W.shape[1]
    width = scheme.width(n)
    codes = q.codes.T.contiguous()
    gradients = H @ (W - dequantize(q, scheme)).T
    group = torch.arange(n, device=W.device) // width
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        own = group[start:end]
        scales, zeros = q.scales.T[own].contiguous(), q.zeros.T[own].float().contiguous()
        steps = gradients[start:end].clone()
        descend_columns(steps, H[start:, start:], scales, zeros, codes[start:end], 1, scheme)
        gradients.addmm_(H[:, start:end], steps, alpha=-1)
    return _better_rows(W, H, q, q._replace(codes=codes.T.contiguous()), scheme)


def refine(W: Tensor, H: Tensor, q: Quantized, scheme: Scheme, passes: int) -> Quantized:
    """Scales and integers in turn."""
    for _ in range(passes):
        q = descend(W, H, refit_scales(W, H, q, scheme), scheme)
    return q


def _better_rows(W: Tensor, H: Tensor, before: Quantized, after: Quantized, scheme: Scheme) -> Quantized:
    better = (row_losses(W, after, scheme, H) < row_losses(W, before, scheme, H)).unsqueeze(1)
    return Quantized(*(torch.where(better, new, old) for new, old in zip(after, before, strict=True)))
