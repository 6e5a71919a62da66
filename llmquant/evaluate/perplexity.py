"""Perplexity: exp of the mean negative log-likelihood of the next token, and the protocol that gives it a meaning.

A perplexity without its protocol cannot be compared with anything: tools differ in window length, in how the text is
joined and in where a beginning-of-text token goes. Here it is the protocol of the GPTQ paper (arXiv 2210.17323,
section 4): the whole text is tokenized once and cut into windows that do not overlap; the remainder is dropped.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmquant.errors import NumericsError, RecipeError

PIECE = 2**22  # logits that are turned into fp64 log-probabilities at a time: 32 MB


@dataclass(frozen=True)
class Protocol:
    """How a number was measured; numbers compare only where all of it is equal."""

    text: str  # name and the first 12 digits of the sha256
    seq_len: int  # tokens of a window
    windows: int
    tokens: int  # predicted: all but the first of each window
    bos: bool  # the text begins with the tokenizer's beginning-of-text token
    dtype: str  # of the computation

    def __str__(self) -> str:
        bos = "with" if self.bos else "without"
        return (
            f"{self.text}, tokenized whole {bos} BOS, {self.windows} windows of {self.seq_len} without overlap, "
            f"{self.tokens} predicted tokens, {self.dtype}"
        )


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(mean of `nll`); `nll` is the mean negative log-likelihood in nats of each window."""

    value: float
    nll: tuple[float, ...]
    protocol: Protocol

    @classmethod
    def of(cls, nll: list[float], protocol: Protocol) -> "Perplexity":
        """From the means of windows of equal length."""
        return cls(math.exp(math.fsum(nll) / len(nll)), tuple(nll), protocol)


def windows(
    tokenizer: PreTrainedTokenizerBase, text: str, seq_len: int, max_windows: int | None = None
) -> torch.LongTensor:
    """Token ids [w, seq_len] of the first windows of `text`; a text shorter than one window is one shorter window.

    Raises:
        RecipeError: fewer than two tokens in the text or in a window, so that there is nothing to predict.
    """
    if seq_len < 2 or (max_windows is not None and max_windows < 1):
        raise RecipeError(f"--seq-len {seq_len}, --max-windows {max_windows}: need at least 2 tokens and 1 window")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < 2:
        raise RecipeError(f"text: has {len(ids)} tokens; perplexity needs at least 2")
    width = min(seq_len, len(ids))
    return ids[: len(ids) // width * width].view(-1, width)[:max_windows]  # type: ignore[return-value]


@torch.inference_mode()
def log_probs(model: PreTrainedModel, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What the model says of each next token in one window `ids` [T], some positions at a time.

    Yields the tokens that came next [r, 1] and the log-probabilities before them, float64 [r, vocab], over all
    T - 1 positions in order. Only a piece of the logits is ever widened: the whole of them exists once.

    Raises:
        NumericsError: the model gave NaN or Inf.
    """
    ids = ids.to(model.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    rows = max(1, PIECE // logits.shape[-1])
    for after, piece in zip(ids[1:, None].split(rows), logits.split(rows), strict=True):
        if not piece.isfinite().all():
            raise NumericsError(f"{model.name_or_path}: logits are NaN or Inf; run llmquant verify on it")
        yield after, piece.double().log_softmax(-1)


def perplexity(model: PreTrainedModel, windows: Tensor, protocol: Protocol) -> Perplexity:
    """Perplexity over token ids `windows` [w, T], each window on its own.

    Raises:
        NumericsError: the model gave NaN or Inf.
    """
    return Perplexity.of([_nll(model, ids) for ids in windows], protocol)


def _nll(model: PreTrainedModel, ids: Tensor) -> float:
    return float(torch.cat([-logp.gather(1, after) for after, logp in log_probs(model, ids)]).mean())
