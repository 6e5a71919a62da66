"""The operands of com.microsoft.MatMulNBits, ONNX Runtime's product with packed weights.

    B            uint8 [m, blocks, g * bits / 8]      codes, the first in the low nibble
    scales       fp32  [m, blocks]
    zero_points  uint8 [m, ceil(blocks * bits / 8)]   packed along a row; none if symmetric

(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md). The last block is filled up. A group of a
whole row repeats its scale for each 32 columns; codes of 3 bits are moved to the midpoint of 4.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llmquant.formats import bits
from llmquant.scheme import Quantized, Scheme

ROW_BLOCK = 32  # columns of a block where the group is the row


def block_size(scheme: Scheme) -> int:
    return ROW_BLOCK if scheme.group_size == -1 else scheme.group_size


def width(scheme: Scheme) -> int:
    """Bits of a stored code."""
    return 8 if scheme.bits == 8 else 4


def specs(m: int, n: int, scheme: Scheme) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of what `pack` gives."""
    g, stored = block_size(scheme), width(scheme)
    blocks = -(-n // g)
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "B": (torch.uint8, (m, blocks, g * stored // 8)),
        "scales": (torch.float32, (m, blocks)),
    }
    return found if scheme.symmetric else found | {"zero_points": (torch.uint8, (m, -(-blocks * stored // 8)))}


def pack(q: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """The operands of `specs`, of the same value as the weight bit for bit."""
    m, n = q.codes.shape
    g, stored = block_size(scheme), width(scheme)
    shift = 2 ** (stored - 1) - scheme.midpoint
    group = torch.arange(0, n, g) // scheme.width(n)  # of each block
    codes = F.pad(q.codes + shift, (0, -n % g)).view(m, -1, g)
    operands = {"B": _octets(codes, stored), "scales": q.scales[:, group].contiguous()}
    return operands if scheme.symmetric else operands | {"zero_points": _octets(q.zeros[:, group] + shift, stored)}


def _octets(codes: Tensor, stored: int) -> Tensor:
    """Codes [..., n] in bytes [..., ceil(n * stored / 8)]."""
    size = -(-codes.shape[-1] * stored // 8)
    words = bits.pack(codes, stored)
    return words.view(torch.uint8)[..., :size].contiguous()
