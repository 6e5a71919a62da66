"""How far a model's predictions moved from a baseline's: KL divergence and agreement, position by position.

Perplexity can stay while answers change; the KL divergence of the next-token distributions cannot
("Accuracy is Not All You Need", arXiv 2407.09141).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.evaluate.perplexity import Perplexity, Predictor, log_probs
from llmquant.evaluate.protocol import Cut, Window

TOP = 10  # tokens whose overlap is counted


@dataclass(frozen=True)
class Divergence:
    """KL(baseline || model) in nats over all predicted positions, and how much of what they prefer is the same."""

    mean_kl: float
    median_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float  # 0 .. 1: both prefer the same token
    top10_overlap: float  # 0 .. 1: of the ten tokens that each prefers, the share that is in both
    positions: int


@dataclass(frozen=True)
class Comparison:
    """A model beside its baseline, from one pass over the same windows."""

    model: Perplexity
    baseline: Perplexity
    divergence: Divergence
    kl: Tensor  # of each predicted token, fp32 [k]
    same: Tensor  # bool [k]


def compare(model: Predictor, baseline: Predictor, text: Cut) -> Comparison:
    """Both models on the same windows; logits of one window at a time are alive.

    Raises:
        NumericsError: a model gave NaN or Inf.
    """
    return compare_all([model], baseline, text)[0]


def compare_all(models: Sequence[Predictor], baseline: Predictor, text: Cut) -> list[Comparison]:
    """`compare`, of several models with one baseline, which is asked once."""
    read = [window.read for window in text.windows]
    measured: list[list[Tensor]] = [[] for _ in models]
    each = zip(*(model.logits(read) for model in models), strict=True)
    for window, others, ours in zip(text.windows, baseline.logits(read), each, strict=True):
        for model, logits, found in zip(models, ours, measured, strict=True):
            found.append(_positions(window, logits, others, (model.name, baseline.name)))
    return [_comparison(torch.cat(found, dim=1), text) for found in measured]


def _comparison(measured: Tensor, text: Cut) -> Comparison:
    nll, baseline_nll, kl, same, overlap = measured
    return Comparison(
        model=Perplexity.of(nll, text.protocol),
        baseline=Perplexity.of(baseline_nll, text.protocol),
        divergence=_summary(kl, same, overlap),
        kl=kl.float(),
        same=same.bool(),
    )


def _positions(window: Window, logits: Tensor, others: Tensor, names: tuple[str, str]) -> Tensor:
    """Of a window's predicted tokens: both negative log-likelihoods, KL, agreement and overlap, float64 [5, k]."""
    pieces = []
    model, baseline = log_probs(logits, window, names[0]), log_probs(others, window, names[1])
    for (after, logq), (_, logp) in zip(model, baseline, strict=True):
        kl = (logp.exp() * (logp - logq)).sum(-1).clamp_min(0)  # below 0 only by rounding
        same = (logq.argmax(-1) == logp.argmax(-1)).double()
        nll, baseline_nll = (-each.gather(1, after).squeeze(1) for each in (logq, logp))
        pieces.append(torch.stack([nll, baseline_nll, kl, same, _overlap(logq, logp)]).cpu())
    return torch.cat(pieces, dim=1)


def _overlap(logq: Tensor, logp: Tensor) -> Tensor:
    """The share of the most likely tokens that both have in common, [r]."""
    k = min(TOP, logp.shape[-1])
    mine, theirs = (each.topk(k, sorted=False).indices for each in (logq, logp))
    return (mine[:, :, None] == theirs[:, None, :]).sum((1, 2)).double() / k


def _summary(kl: Tensor, same: Tensor, overlap: Tensor) -> Divergence:
    """Quantiles are by nearest rank."""
    ordered = kl.sort().values

    def quantile(q: float) -> float:
        return float(ordered[math.ceil(q * len(ordered)) - 1])

    return Divergence(
        mean_kl=float(kl.mean()),
        median_kl=quantile(0.5),
        p99_kl=quantile(0.99),
        max_kl=quantile(1.0),
        top1_agreement=float(same.mean()),
        top10_overlap=float(overlap.mean()),
        positions=len(kl),
    )
