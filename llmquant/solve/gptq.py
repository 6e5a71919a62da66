"""GPTQ: round one column at a time, and let the columns not yet rounded make up for the error.

Notation as in `hessian.py`. (Frantar et al., arXiv 2210.17323; the correction is QEP, arXiv 2504.09629.)
"""

import torch
from torch import Tensor

from llmquant.scheme import Quantized, Scheme
from llmquant.solve.columns import BLOCK, round_columns, search_columns
from llmquant.solve.grid import check_range
from llmquant.solve.hessian import Factor


def group_order(importance: Tensor, width: int) -> Tensor:
    """Columns by importance inside each group, groups by their greatest: int64 [n].

    A group stays together, so that its grid can be chosen when its turn comes, from weights that carry the errors of
    all before it; and no index has to be stored with the checkpoint. (GPTQModel's group-aware reordering.)
    """
    members = importance.view(-1, width)
    inside = members.argsort(dim=1, descending=True, stable=True)
    inside += torch.arange(0, len(importance), width, device=importance.device).unsqueeze(1)
    return inside[members.amax(1).argsort(descending=True, stable=True)].reshape(-1)


def static_order(importance: Tensor, width: int) -> Tensor:
    """Columns by importance, wherever their group is: int64 [n]. All grids are chosen before the first column."""
    return importance.argsort(descending=True, stable=True)


ORDERS = {"group": group_order, "static": static_order}


def corrected(W: Tensor, D: Tensor, factor: Factor, alpha: float) -> Tensor:
    """W* = W + alpha W D (H + lambda I)^-1, fp32 [m, n]: the weight to aim at instead of W.

    With D = (X - X^)^T X^ / k between the inputs X of the full-precision model and X^ of the quantized one,
    ||X W^T - X^ Q^T||^2 = ||X^ (W* - Q)^T||^2 + const at alpha = 1 and lambda = 0; a smaller alpha fits less of what
    only the calibration text has. (QEP.)
    """
    change = torch.linalg.multi_dot([W, D[:, factor.order], factor.U.T, factor.U])
    return W.index_add(1, factor.order, change, alpha=alpha)


def quantize_gptq(W: Tensor, factor: Factor, weight: Tensor, scheme: Scheme) -> Quantized:
    """Quantize `W` fp32 [m, n], columns in the order of `factor`; codes come in natural order.

    Rows are independent: linears that share an input are stacked and solved at once. In a group order each group's grid
    is chosen when its turn comes; in any other, and where a group is wider than a block, all are chosen first, with
    `weight` [n] for the columns' errors.

    Raises:
        NumericsError: a weight is so large that its scale leaves the range of fp16.
    """
    check_range(W, scheme)
    n = W.shape[1]
    width, order = scheme.width(n), factor.order
    together = factor.grouped and width <= BLOCK
    if together:
        scales = W.new_empty(n // width, len(W))
        zeros = torch.empty_like(scales)
    else:
        scales, zeros = search_columns(W.T.contiguous(), weight, width, scheme)
    step = width if together else 1  # columns that follow each other in one group
    rest = W.T[order].contiguous()  # a column of W is one contiguous row
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=W.device)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        groups = order[start:end:step] // width
        own = scales[groups], zeros[groups]
        block, U = rest[start:end], factor.U[start:, start:]
        round_columns(block, U, *own, codes[start:end], step, scheme, search=together)
        scales[groups], zeros[groups] = own
        rest[end:].addmm_(factor.U[start:end, end:].T, block, alpha=-1)
    natural = torch.empty_like(codes)
    natural[order] = codes
    return Quantized(natural.T.contiguous(), scales.T.contiguous(), zeros.T.to(torch.uint8).contiguous())
