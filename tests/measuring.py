"""Ids as a text that was cut, and what it says of two models; for the tests of several rooms."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmquant.evaluate.divergence import Comparison, compare
from llmquant.evaluate.perplexity import Whole
from llmquant.evaluate.protocol import Cut, Protocol, Window
from llmquant.runtime.linear import QuantLinear
from llmquant.runtime.loader import load
from llmquant.runtime.transformers_plugin import LlmquantConfig


def cut_of(ids: torch.Tensor) -> Cut:
    """Windows [w, T] of which all tokens but the first are predicted."""
    w, T = ids.shape
    protocol = Protocol("random", T, w, w * (T - 1), False, "float32")
    return Cut([Window(window, T - 1) for window in ids], protocol)


def compared(model: PreTrainedModel, baseline: PreTrainedModel, ids: torch.Tensor) -> Comparison:
    return compare(Whole(model), Whole(baseline), cut_of(ids))


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def loaded_alike(directory: Path, ids: torch.Tensor) -> bool:
    """Whether a checkpoint gives the same logits, to rounding, as we load it and as transformers does."""
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return torch.allclose(logits(load(directory, torch.float32), ids), logits(theirs, ids), rtol=1e-4, atol=1e-4)


def the_same_by_our_plugin(directory: Path, ids: torch.Tensor) -> bool:
    """Whether a packed checkpoint gives the same logits, bit for bit, by transformers with our plugin."""
    told = {"quantization_config": LlmquantConfig(), "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(directory, **told).eval()
    assert sum(isinstance(module, QuantLinear) for module in theirs.modules()) >= 10
    return torch.equal(logits(theirs, ids), logits(load(directory, torch.float32), ids))
