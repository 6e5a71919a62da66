"""Ids as a text that was cut, and what it says of two models; for the tests of several rooms."""

import torch
from transformers import PreTrainedModel

from llmquant.evaluate.divergence import Comparison, compare
from llmquant.evaluate.perplexity import Whole
from llmquant.evaluate.protocol import Cut, Protocol, Window


def cut_of(ids: torch.Tensor) -> Cut:
    """Windows [w, T] of which all tokens but the first are predicted."""
    w, T = ids.shape
    protocol = Protocol("random", T, w, w * (T - 1), False, "float32")
    return Cut([Window(window, T - 1) for window in ids], protocol)


def compared(model: PreTrainedModel, baseline: PreTrainedModel, ids: torch.Tensor) -> Comparison:
    return compare(Whole(model), Whole(baseline), cut_of(ids))
