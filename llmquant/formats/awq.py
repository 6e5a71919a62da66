"""The AWQ layout "gemm", as AutoAWQ introduced it and vLLM, SGLang and transformers read it.

    <p>.qweight  int32 [n, m / 8]  codes, packed along m
    <p>.qzeros   int32 [G, m / 8]  zero points, packed along m
    <p>.scales   fp16  [G, m]

Of eight neighbours the even ones come first: nibbles 0 .. 7 of a word, from the lowest, hold rows 0 2 4 6 1 3 5 7. Zero
points are always there, those of a symmetric weight too. The layout has 4 bits and one scheme for all linears.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import RecipeError
from llmquant.formats import bits
from llmquant.formats.checks import check_in_place, check_midpoint, read_checked, read_scheme, stored_scales
from llmquant.formats.rules import settings
from llmquant.scheme import Quantized, Scheme
from llmquant.version import __version__

NAME = "awq"
NIBBLES = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # the row in each nibble
ROWS = NIBBLES.argsort()  # the nibble of each row


def specs(
    prefix: str, m: int, n: int, scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes in file order. Scales are fp16 whatever the model's `dtype` is."""
    groups = scheme.groups(n)
    return {
        f"{prefix}.qweight": (torch.int32, (n, bits.words(m, scheme.bits))),
        f"{prefix}.qzeros": (torch.int32, (groups, bits.words(m, scheme.bits))),
        f"{prefix}.scales": (torch.float16, (groups, m)),
    }


def pack(
    prefix: str, q: Quantized, scheme: Scheme, dtype: torch.dtype, order: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of `specs`.

    Raises:
        NumericsError: a scale is not exact in fp16.
        RecipeError: the columns are reordered.
    """
    check_in_place(prefix, order, NAME)
    return {
        f"{prefix}.qweight": bits.pack(_by_eight(q.codes.T, NIBBLES), 4),
        f"{prefix}.qzeros": bits.pack(_by_eight(q.zeros.T, NIBBLES), 4),
        f"{prefix}.scales": stored_scales(f"{prefix}.scales", q.scales.T, torch.float16),
    }


def unpack(prefix: str, stored: Mapping[str, Tensor], m: int, n: int, scheme: Scheme) -> Quantized:
    """The inverse of `pack`.

    Raises:
        CheckpointError: a tensor is malformed, or zero points contradict the scheme.
    """
    tensors = read_checked(stored, specs(prefix, m, n, scheme, torch.float16))
    codes, zeros = (_by_eight(bits.unpack(tensors[leaf], 4, m), ROWS).T.contiguous() for leaf in ("qweight", "qzeros"))
    check_midpoint(f"{prefix}.qzeros", zeros, scheme)
    return Quantized(codes, tensors["scales"].T.float().contiguous(), zeros)


def order(prefix: str, stored: Mapping[str, Tensor], n: int, scheme: Scheme) -> Tensor | None:
    """None: columns are always in place."""
    return None


def refuse(m: int, n: int, scheme: Scheme) -> str | None:
    """Why a linear of this shape cannot be held; None if it can."""
    if scheme.bits != 4:
        return f"it has 4 bits, not {scheme.bits}"
    if n % scheme.width(n):
        return f"group size {scheme.group_size} does not divide {n} columns"
    return f"{m} rows are not a multiple of 8" if m % 8 else None


def caveats(schemes: Collection[Scheme]) -> list[str]:
    """What a user should know about clients of this layout that cannot read these schemes."""
    if any(scheme.group_size == -1 for scheme in schemes):
        return ["transformers' CPU kernel for awq files needs groups of 32, 64 or 128; use compressed-tensors"]
    return []


def config_block(schemes: Mapping[str, Scheme], skipped: Sequence[str]) -> dict[str, Any]:
    """One scheme. `zero_point` stays true for a symmetric one, whose zero points are stored as well.

    Raises:
        RecipeError: there are several schemes, or a name to skip is a part of the name of a quantized linear.
    """
    distinct = list(dict.fromkeys(schemes.values()))
    if len(distinct) > 1:
        raise RecipeError(
            f"format: awq holds one scheme, but linears get {' and '.join(map(str, distinct))}; "
            "choose a group size that divides all of them, or --format compressed-tensors"
        )
    for name in skipped:
        if whole := next((other for other in schemes if name in other), None):
            raise RecipeError(f"format: awq skips linears by parts of names, and {name} is a part of {whole}")
    (scheme,) = distinct
    return {
        "quant_method": NAME,
        "version": "gemm",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "zero_point": True,
        "sym": scheme.symmetric,
        "lm_head": "lm_head" in schemes,
        "modules_to_not_convert": list(skipped),
        "meta": {"quantizer": [f"llmquant:{__version__}"]},
    }


def read_config(block: dict[str, Any], linears: Sequence[str]) -> dict[str, Scheme]:
    """Which linears are quantized, and how; from what AutoAWQ, GPTQModel and AutoRound write, too.

    Raises:
        CheckpointError: a scheme or rule that cannot be read.
    """
    return {
        name: read_scheme(
            own.get("bits", own.get("w_bit")),
            own.get("group_size", own.get("q_group_size")),
            own.get("sym", not own.get("zero_point", True)),
        )
        for name, own in settings(block, linears).items()
    }


def _by_eight(rows: Tensor, order: Tensor) -> Tensor:
    """Each eight neighbours of the last dimension in another order."""
    return rows.unflatten(-1, (-1, 8))[..., order.to(rows.device)].flatten(-2)
