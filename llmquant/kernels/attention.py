"""Our causal attention among those of transformers, which takes the others wherever ours does not serve."""

import inspect
import re
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from llmquant.kernels import ops  # noqa: F401  (defines torch.ops.llmquant)
from llmquant.kernels.layout import KINDS
from llmquant.native import Library, find_library

NAME = "llmquant"
ATTENTION = torch.ops.llmquant.attention.default
FEWEST = 16  # queries; a token by itself is torch's
COMPARED = re.compile(r"_attn_implementation\s*(==|!=|in\b|not\b)")


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`: query [B, heads, T, d], key and value [B, kv_heads, S, d], out [B, T, heads, d].

    Without a mask and without a gradient it is ours; else torch's. The queries are those of the last T keys.
    """
    causal, scale = options.get("is_causal"), options.get("scaling")
    (*_, queries, width), keys = query.shape, key.shape[2]
    ahead = attention_mask is None and (getattr(module, "is_causal", True) if causal is None else causal)
    plain = not options.get("dropout") and options.get("position_bias") is None and options.get("softcap") is None
    served = query.device.type == "cpu" and query.dtype in KINDS and FEWEST <= queries <= keys
    trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if ahead and plain and served and not trained:
        return ATTENTION(query, key, value, width**-0.5 if scale is None else scale), None
    if ahead and 1 < queries < keys:  # torch takes these for the queries of the first keys
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        attention_mask = attention_mask.view(1, 1, queries, keys)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def causal_mask(**asked: Any) -> Tensor | None:
    """As `sdpa_mask`, but on the CPU none for the queries of the last of several keys, if only order hides a key."""
    queries, keys, padding = asked.get("q_length"), asked["kv_length"], asked.get("attention_mask")
    plain = asked.get("mask_function") is causal_mask_function and asked.get("allow_is_causal_skip", True)
    here = asked.get("local_size") is None and torch.device(asked.get("device", "cpu")).type == "cpu"
    if plain and here and not torch.compiler.is_compiling():
        last = isinstance(queries, int) and FEWEST <= queries and asked.get("q_offset") == keys - queries
        if last and (padding is None or (padding.shape[-1] == keys and bool(padding.all()))):
            return None
    return sdpa_mask(**asked)


def use_attention(model: PreTrainedModel) -> None:
    """Let the model attend by ours, if it would by torch's `scaled_dot_product_attention` and the library is there.

    Not where its own code asks for the name: DeepSeek-V3.2's hides the tokens that it did not choose by names that it
    knows alone, and attends to all of them by any other.
    """
    usual = model.config._attn_implementation == "sdpa" and isinstance(find_library(), Library)
    if usual and not any(_asks_for_the_name(type(module)) for module in model.modules()):  # type: ignore[arg-type]
        model.set_attn_implementation(NAME)


@cache
def _asks_for_the_name(kind: type[nn.Module]) -> bool:
    """Whether the code of a module compares the name of the attention with others; if nobody can tell, it does.

    Whole models may: how Gemma 4 passes fewer queries than keys is right for ours.
    """
    if kind.__module__.startswith("torch.") or issubclass(kind, PreTrainedModel):
        return False
    try:
        return bool(COMPARED.search(inspect.getsource(kind)))
    except (OSError, TypeError):
        return True


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, causal_mask)
