"""How many tokens the caches of all requests may hold together, by the memory that is left."""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from llmquant.memory import available
from llmquant.runtime.decode import CACHE

SHARE = 0.8  # of what is free; activations of a prompt's part, and buffers while they grow, need some


def room_for(model: PreTrainedModel, limit: int | None) -> int:
    """Tokens, for at most so many bytes; None: for SHARE of what is free where the model is."""
    return int(SHARE * available(model.device) if limit is None else limit) // token_bytes(model)


def token_bytes(model: PreTrainedModel) -> int:
    """What a token takes in a request's cache: the model is asked, as not all have keys and values of one shape."""
    cache: Any = DynamicCache(config=model.config)
    with torch.inference_mode():
        told: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1, CACHE: cache}
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), **told)
    return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers)
