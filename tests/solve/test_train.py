"""Trained rounding: it moves towards the target, and what does not help on held-out batches is dropped."""

import torch

from llmquant.scheme import Quantized, Scheme, dequantize
from llmquant.solve.rtn import quantize_rtn
from llmquant.solve.train import token_loss, train_rounding

SCHEME = Scheme(4, 32, symmetric=False)


Layer = tuple[torch.Tensor, Quantized, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]


def layer(seed: int = 0) -> Layer:
    """A linear rounded to nearest, correlated inputs, the outputs of the original, masks."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(24, 64, generator=generator) * 0.1
    mix = torch.eye(64) + 0.2 * torch.randn(64, 64, generator=generator)
    X = [torch.randn(1, 64, 64, generator=generator) @ mix for _ in range(8)]
    return W, quantize_rtn(W, SCHEME), X, [x @ W.T for x in X], [torch.ones(1, 64, dtype=torch.bool) for _ in X]


def train(
    W: torch.Tensor, q: Quantized, X: list[torch.Tensor], targets: list[torch.Tensor], masks: list[torch.Tensor]
) -> tuple[dict[str, Quantized], float, float]:
    forward = lambda weights, i: X[i] @ weights["l"].T  # noqa: E731
    return train_rounding(
        forward, targets, masks, {7}, {"l": (q, SCHEME, W)}, iterations=100, dtype=torch.float32, seed=0
    )


def test_the_error_falls_on_what_was_held_out() -> None:
    W, q, X, targets, masks = layer()
    trained, before, after = train(W, q, X, targets, masks)
    assert after < 0.9 * before
    error = token_loss(X[7] @ dequantize(trained["l"], SCHEME).T, targets[7], masks[7])
    assert abs(float(error) - after) < 1e-6 * after
    assert (trained["l"].codes != q.codes).any()
    assert torch.equal(trained["l"].scales, trained["l"].scales.bfloat16().float())
    assert int(trained["l"].codes.max()) <= SCHEME.max_code


def test_what_makes_the_held_out_error_worse_is_dropped() -> None:
    W, q, X, targets, masks = layer()
    targets[7] = X[7] @ dequantize(q, SCHEME).T  # already exact there: every step is one away
    trained, before, after = train(W, q, X, targets, masks)
    assert before == after
    assert trained["l"] is q


def test_padding_has_no_part_in_it() -> None:
    W, q, X, targets, masks = layer()
    expected, *_ = train(W, q, X, targets, masks)
    for mask, target in zip(masks, targets, strict=True):
        mask[0, 40:] = False
        target[0, 40:] = 1e6
    short = train(W, q, [x[:, :40] for x in X], [t[:, :40] for t in targets], [m[:, :40] for m in masks])[0]
    masked = train(W, q, X, targets, masks)[0]
    assert torch.equal(short["l"].codes, masked["l"].codes)
    assert not torch.equal(expected["l"].codes, masked["l"].codes)


def test_the_same_seed_gives_the_same_codes() -> None:
    W, q, X, targets, masks = layer()
    runs = [train(W, q, X, targets, masks)[0]["l"].codes for _ in range(2)]
    assert torch.equal(*runs)


def test_a_token_counts_by_its_own_size() -> None:
    target = torch.tensor([[[1.0, 0.0], [1000.0, 0.0]]])
    output = target * 1.1
    assert torch.allclose(token_loss(output, target, torch.ones(1, 2, dtype=torch.bool)), torch.tensor(0.01))
