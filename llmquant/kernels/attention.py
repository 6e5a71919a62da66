"""Our causal attention among those of transformers, which takes the others wherever ours does not serve."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from llmquant.kernels import ops  # noqa: F401  (defines torch.ops.llmquant)
from llmquant.kernels.layout import KINDS
from llmquant.native import Library, find_library

NAME = "llmquant"
ATTENTION = torch.ops.llmquant.attention.default
FEWEST = 16  # queries; a token by itself is torch's


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`: query [B, heads, T, d], key and value [B, kv_heads, S, d], out [B, T, heads, d].

    Without a mask, T = S and no gradient it is ours; else torch's.
    """
    causal, scale = options.get("is_causal"), options.get("scaling")
    plain = (
        attention_mask is None
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and not options.get("dropout")
        and options.get("position_bias") is None
        and options.get("softcap") is None
    )
    served = query.device.type == "cpu" and query.dtype in KINDS and FEWEST <= query.shape[2] == key.shape[2]
    trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if plain and served and not trained:
        return ATTENTION(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def use_attention(model: PreTrainedModel) -> None:
    """Let the model attend by ours, if it would by torch's `scaled_dot_product_attention` and the library is there."""
    if model.config._attn_implementation == "sdpa" and isinstance(find_library(), Library):
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
