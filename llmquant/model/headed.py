"""A causal language model where transformers has its text model alone, inside of one that also sees.

The text model of GLM-5-Next, Mistral Large 4 or Step 3.7 with the head that the whole one has, and with what that does
to logits, which configurations name alike.
"""

from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaForCausalLM, PretrainedConfig, PreTrainedModel


@cache
def headed(text: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of a text model with a head, for the same configuration; it generates as others do."""
    family: Any = text.__mro__[1]

    def __init__(self: Any, config: PretrainedConfig) -> None:
        family.__init__(self, config)
        self.model = text(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @wraps(LlamaForCausalLM.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        out = LlamaForCausalLM.forward(self, *args, **options)
        out.logits = scaled(out.logits, self.config)
        return out

    own = {"__init__": __init__, "forward": forward, "base_model_prefix": "model", "__module__": text.__module__}
    own |= {"_tied_weights_keys": {"lm_head.weight": "model.embed_tokens.weight"}}
    return type(text.__name__.removesuffix("Model") + "ForCausalLM", (family, GenerationMixin), own)


def scaled(logits: Tensor, config: PretrainedConfig) -> Tensor:
    """Logits as a configuration says that those of its head are scaled and capped."""
    logits = logits * getattr(config, "output_multiplier", 1.0) / getattr(config, "logits_scaling", 1.0)
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits
