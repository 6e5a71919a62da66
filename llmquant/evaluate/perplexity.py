"""Perplexity: exp of the mean negative log-likelihood of what comes, per token or per word as the protocol says."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol as Interface

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmquant.errors import NumericsError
from llmquant.evaluate.protocol import Cut, Protocol, Window

PIECE = 2**20  # logits that are turned into fp64 log-probabilities at a time: 8 MB


class Predictor(Interface):
    """A model that is asked what comes next."""

    name: str

    def logits(self, windows: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each window [T] in turn, what comes after each of its tokens: [T, vocab]."""


class Whole:
    """A model that is in memory as a whole."""

    def __init__(self, model: PreTrainedModel, noticed: Callable[[float], None] = lambda part: None) -> None:
        """`noticed` is told each part of the work that is done; the parts add up to 1."""
        self.name = str(model.name_or_path)
        self._model, self._noticed = model, noticed

    @torch.no_grad()
    def logits(self, windows: Sequence[Tensor]) -> Iterator[Tensor]:
        for ids in windows:
            yield self._model(input_ids=ids.to(self._model.device)[None], use_cache=False).logits[0]
            self._noticed(1 / len(windows))


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(sum of nats / units of the protocol); `nll` are the nats of each predicted token, fp64 [k]."""

    value: float
    nll: Tensor
    protocol: Protocol

    @classmethod
    def of(cls, nll: Tensor, protocol: Protocol) -> "Perplexity":
        return cls(math.exp(math.fsum(nll.tolist()) / protocol.unit), nll, protocol)


def perplexity(model: Predictor, text: Cut) -> Perplexity:
    """Logits of one window at a time are alive.

    Raises:
        NumericsError: the model gave NaN or Inf.
    """
    logits = model.logits([window.read for window in text.windows])
    nll = [
        -logp.gather(1, after).squeeze(1).cpu()
        for window in text.windows
        for after, logp in log_probs(next(logits), window, model.name)
    ]
    return Perplexity.of(torch.cat(nll), text.protocol)


def log_probs(logits: Tensor, window: Window, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """What the model `name` says of each predicted token of a window, some positions at a time.

    `logits` [T - 1, vocab] is what comes after each token that was read. Yields the tokens that came [r, 1] and the
    log-probabilities before them, float64 [r, vocab], over all predicted positions in order. Only a piece of the
    logits is ever widened.

    Raises:
        NumericsError: the logits hold NaN or Inf.
    """
    logits = logits[-window.predicted :]
    after = window.ids[-window.predicted :, None].to(logits.device)
    rows = max(1, PIECE // logits.shape[-1])
    for came, piece in zip(after.split(rows), logits.split(rows), strict=True):
        if not piece.isfinite().all():
            raise NumericsError(f"{name}: logits are NaN or Inf; run llmquant verify on it")
        yield came, piece.double().log_softmax(-1)
