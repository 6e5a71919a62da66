"""The GPTQ layout, as AutoGPTQ introduced it and vLLM, SGLang, transformers and llama.cpp read it.

    <p>.qweight  int32 [n * bits / 32, m]  codes, packed along n: the transpose of words along a row
    <p>.qzeros   int32 [G, m * bits / 32]  zero points, packed along m
    <p>.scales   fp16  [G, m]
    <p>.g_idx    int32 [n]                 group of each column; transformers refuses files without it

Version 1, which every loader reads, stores z - 1, and loaders put the one back with a single addition to each packed
word. A stored maximum (z = 0) would carry into its neighbour's bits there, so an asymmetric weight must keep every zero
point at 1 or above. Version 2 stores z. Servers run only symmetric weights of either.

With activation order (desc_act) the columns of a group are not neighbours, and g_idx says which belong together.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import RecipeError
from llmquant.formats import bits
from llmquant.formats.checks import (
    check_midpoint,
    column_order,
    group_of_column,
    read_checked,
    read_scheme,
    stored_scales,
)
from llmquant.formats.rules import settings
from llmquant.scheme import Quantized, Scheme
from llmquant.version import __version__

# Servers fuse these linears and look up the rules of `dynamic` under the fused name.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Gptq:
    """One version of the layout.

    Attributes:
        NAME: also its `checkpoint_format`.
        less: what is taken from a zero point before it is stored.
    """

    def __init__(self, name: str, less: int) -> None:
        self.NAME = name
        self.less = less

    def specs(
        self, prefix: str, m: int, n: int, scheme: Scheme, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names, dtypes and shapes in file order. Scales are fp16 whatever the model's `dtype` is."""
        groups = scheme.groups(n)
        return {
            f"{prefix}.qweight": (torch.int32, (bits.words(n, scheme.bits), m)),
            f"{prefix}.qzeros": (torch.int32, (groups, bits.words(m, scheme.bits))),
            f"{prefix}.scales": (torch.float16, (groups, m)),
            f"{prefix}.g_idx": (torch.int32, (n,)),
        }

    def pack(
        self, prefix: str, q: Quantized, scheme: Scheme, dtype: torch.dtype, order: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The tensors of `specs`.

        Raises:
            RecipeError: a zero point is 0, in version 1.
            NumericsError: a scale is not exact in fp16.
        """
        if self.less and not bool(q.zeros.all()):
            row, group = torch.nonzero(q.zeros == 0)[0].tolist()
            raise RecipeError(
                f"{prefix}.qzeros: row {row}, group {group} has zero point 0, which {self.NAME} cannot store; "
                "use --sym or --format compressed-tensors"
            )
        codes, groups = q.codes, group_of_column(q.codes.shape[1], scheme).to(q.codes.device)
        if order is not None:
            back = order.argsort()
            codes, groups = codes[:, back], groups[back]
        return {
            f"{prefix}.qweight": bits.pack(codes, scheme.bits).T.contiguous(),
            f"{prefix}.qzeros": bits.pack((q.zeros - self.less).T, scheme.bits),
            f"{prefix}.scales": stored_scales(f"{prefix}.scales", q.scales.T, torch.float16),
            f"{prefix}.g_idx": groups,
        }

    def unpack(self, prefix: str, stored: Mapping[str, Tensor], m: int, n: int, scheme: Scheme) -> Quantized:
        """The inverse of `pack`.

        Raises:
            CheckpointError: a tensor is malformed, or zero points contradict the scheme.
        """
        needed = self.specs(prefix, m, n, scheme, torch.float16)
        needed.pop(f"{prefix}.g_idx")  # only some tools write it
        tensors = read_checked(stored, needed)
        codes = bits.unpack(tensors["qweight"].T, scheme.bits, n)
        columns = self.order(prefix, stored, n, scheme)
        zeros = (bits.unpack(tensors["qzeros"], scheme.bits, m).T + self.less).contiguous() & scheme.max_code
        check_midpoint(f"{prefix}.qzeros", zeros, scheme)
        return Quantized(
            codes if columns is None else codes[:, columns], tensors["scales"].T.float().contiguous(), zeros
        )

    def order(self, prefix: str, stored: Mapping[str, Tensor], n: int, scheme: Scheme) -> Tensor | None:
        """The columns of the weight that `unpack` gives, in their order; None if they are in place."""
        name = f"{prefix}.g_idx"
        return column_order(name, stored[name], n, scheme) if name in stored else None

    def refuse(self, m: int, n: int, scheme: Scheme) -> str | None:
        """Why a linear of this shape cannot be held; None if it can."""
        if n % scheme.width(n):
            return f"group size {scheme.group_size} does not divide {n} columns"
        whole = 32 if scheme.bits == 3 else 32 // scheme.bits  # the codes that end where a word does
        return f"{m} x {n} is not a multiple of {whole} both ways" if m % whole or n % whole else None

    def caveats(self, schemes: Collection[Scheme]) -> list[str]:
        """What a user should know about clients of this layout that cannot read these schemes."""
        found = []
        if len(schemes) > 1:
            found.append(
                "transformers reads a single scheme of gptq files; vLLM reads several, and so does compressed-tensors"
            )
        if any(scheme.group_size == -1 for scheme in schemes):
            found.append(
                "transformers' CPU kernel for gptq files needs groups of 32, 64 or 128; use compressed-tensors"
            )
        if any(scheme.bits == 3 for scheme in schemes):
            found.append("vLLM and SGLang refuse 3 bits in gptq files; transformers reads them")
        if not all(scheme.symmetric for scheme in schemes):
            found.append("vLLM and SGLang refuse asymmetric gptq files; use awq or compressed-tensors for them")
        return found

    def config_block(self, schemes: Mapping[str, Scheme], skipped: Sequence[str]) -> dict[str, Any]:
        """The most frequent scheme at the top level, exceptions as `dynamic` rules.

        transformers ignores `dynamic` and wants the list of quantized modules, in lists of lists; vLLM reads both.
        """
        usual = Counter(schemes.values()).most_common(1)[0][0]
        block = {
            "quant_method": "gptq",
            **_options(usual),
            "desc_act": False,
            "static_groups": False,
            "true_sequential": True,
            "lm_head": "lm_head" in schemes,
            "pack_dtype": "int32",
            "checkpoint_format": self.NAME,
            "format": self.NAME,
            "meta": {"quantizer": [f"llmquant:{__version__}"]},
        }
        if skipped:
            block["modules_in_block_to_quantize"] = [[name] for name in schemes]
        rules: dict[str, Any] = {f"-:{_exactly(name)}": {} for name in _with_fused(dict.fromkeys(skipped))}
        unusual = _with_fused({name: scheme for name, scheme in schemes.items() if scheme != usual})
        rules |= {f"+:{_exactly(name)}": _options(scheme) for name, scheme in unusual.items()}
        return block | ({"dynamic": rules} if rules else {})

    def read_config(self, block: dict[str, Any], linears: Sequence[str]) -> dict[str, Scheme]:
        """Which linears are quantized, and how; from what AutoGPTQ, GPTQModel and AutoRound write, too.

        Raises:
            CheckpointError: a scheme or rule that cannot be read.
        """
        return {
            name: read_scheme(own.get("bits"), own.get("group_size"), own.get("sym", True))
            for name, own in settings(block, linears).items()
        }


V1, V2 = Gptq("gptq", less=1), Gptq("gptq_v2", less=0)


def _options(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def _with_fused(rules: dict[str, Any]) -> dict[str, Any]:
    """The same rules, and those that all parts of a fused linear share under its name too."""
    fused = {}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in rules):
        for whole, parts in FUSED.items():
            found = [rules.get(f"{parent}.{part}", parts) for part in parts]
            if all(rule == found[0] for rule in found) and found[0] is not parts:
                fused[f"{parent}.{whole}"] = found[0]
    return rules | fused
