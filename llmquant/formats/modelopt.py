"""The layout W4A16_AWQ of NVIDIA's ModelOpt, which TensorRT-LLM reads; written only, and never run in it by us.

    <p>.weight           uint8 [m / 2, n]  codes as int4, code - 8: row 2 i in the low nibbles of row i, 2 i + 1 above
    <p>.weight_scale     float [m, G]      in the model's dtype
    <p>.pre_quant_scale  float [n]         what activations are multiplied by: ones. Linears that the engine fuses with
                                           others have none: there it stands in the norm before them

(modelopt/torch/export/quant_utils.py, pack_int4_in_uint8, and tensorrt_llm/_torch/modules/linear.py). 4 bits,
symmetric, groups of 64 or 128.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import RecipeError
from llmquant.formats.checks import check_in_place, stored_scales
from llmquant.formats.gptq import FUSED
from llmquant.scheme import Quantized, Scheme
from llmquant.version import __version__

NAME = "modelopt"
GROUP_SIZES = (64, 128)


def specs(
    prefix: str, m: int, n: int, scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes in file order."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{prefix}.weight": (torch.uint8, (m // 2, n)),
        f"{prefix}.weight_scale": (dtype, (m, scheme.groups(n))),
    }
    return found if _is_fused(prefix) else found | {f"{prefix}.pre_quant_scale": (dtype, (n,))}


def pack(
    prefix: str, q: Quantized, scheme: Scheme, dtype: torch.dtype, order: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of `specs`.

    Raises:
        NumericsError: a scale is not exact in `dtype`.
        RecipeError: the columns are reordered.
    """
    check_in_place(prefix, order, NAME)
    signed = q.codes ^ 8  # the nibble of code - 8 in two's complement
    tensors = {
        f"{prefix}.weight": signed[0::2] | signed[1::2] << 4,
        f"{prefix}.weight_scale": stored_scales(f"{prefix}.weight_scale", q.scales, dtype),
    }
    ones = torch.ones(q.codes.shape[1], dtype=dtype)
    return tensors if _is_fused(prefix) else tensors | {f"{prefix}.pre_quant_scale": ones}


def refuse(m: int, n: int, scheme: Scheme) -> str | None:
    """Why a linear of this shape cannot be held; None if it can."""
    if scheme.bits != 4 or not scheme.symmetric:
        return f"it has 4 bits without zero points, not {scheme}"
    if scheme.group_size not in GROUP_SIZES:
        return f"its groups are of 64 or 128 columns, not {scheme.group_size}"
    return f"{m} rows are not even" if m % 2 else None


def config_block(schemes: Mapping[str, Scheme], skipped: Sequence[str]) -> dict[str, Any]:
    """hf_quant_config.json.

    Raises:
        RecipeError: there are several schemes.
    """
    distinct = list(dict.fromkeys(schemes.values()))
    if len(distinct) > 1:
        raise RecipeError(f"modelopt holds one scheme, but linears have {' and '.join(map(str, distinct))}")
    return {
        "producer": {"name": "llmquant", "version": __version__},
        "quantization": {
            "quant_algo": "W4A16_AWQ",
            "group_size": distinct[0].group_size,
            "has_zero_point": False,
            "pre_quant_scale": True,
            "kv_cache_quant_algo": None,
            "exclude_modules": list(skipped),
        },
    }


def _is_fused(prefix: str) -> bool:
    return any(prefix.rpartition(".")[2] in parts for parts in FUSED.values())
