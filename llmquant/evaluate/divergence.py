"""How far a model's predictions moved from a baseline's: KL divergence and top-1 agreement, position by position.

Perplexity can stay while answers change; the KL divergence of the next-token distributions cannot
("Accuracy is Not All You Need", arXiv 2407.09141).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmquant.evaluate.perplexity import Perplexity, Protocol, log_probs


@dataclass(frozen=True)
class Divergence:
    """KL(baseline || model) in nats over all predicted positions, and how often both prefer the same token."""

    mean_kl: float
    median_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float  # 0 .. 1
    positions: int


@dataclass(frozen=True)
class Comparison:
    """A model beside its baseline, from one pass over the same windows."""

    model: Perplexity
    baseline: Perplexity
    divergence: Divergence


def compare(model: PreTrainedModel, baseline: PreTrainedModel, windows: Tensor, protocol: Protocol) -> Comparison:
    """Both models on token ids `windows` [w, T]; logits of one window at a time are alive.

    Raises:
        NumericsError: a model gave NaN or Inf.
    """
    measured = torch.stack([_positions(model, baseline, ids) for ids in windows])  # [w, 4, T - 1]
    nll, baseline_nll, kl, same = measured.unbind(1)
    return Comparison(
        model=Perplexity.of(nll.mean(1).tolist(), protocol),
        baseline=Perplexity.of(baseline_nll.mean(1).tolist(), protocol),
        divergence=_summary(kl.flatten(), same.flatten()),
    )


def _positions(model: PreTrainedModel, baseline: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of one window: both negative log-likelihoods, KL and agreement at every position, float64 [4, T - 1]."""
    pieces = []
    for (after, logq), (_, logp) in zip(log_probs(model, ids), log_probs(baseline, ids), strict=True):
        kl = (logp.exp() * (logp - logq)).sum(-1).clamp_min(0)  # below 0 only by rounding
        same = (logq.argmax(-1) == logp.argmax(-1)).double()
        nll, baseline_nll = (-each.gather(1, after).squeeze(1) for each in (logq, logp))
        pieces.append(torch.stack([nll, baseline_nll, kl, same]).cpu())
    return torch.cat(pieces, dim=1)


def _summary(kl: Tensor, same: Tensor) -> Divergence:
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
        positions=len(kl),
    )
