"""The predicted divergence against its definition, and against a divergence that is measured."""

import pytest
import torch
from torch import Tensor

from llmquant.scheme import Scheme, dequantize
from llmquant.solve import prediction
from llmquant.solve.methods import Choices
from llmquant.solve.moments import relative_error
from llmquant.solve.prediction import Sensor, Trial
from llmquant.solve.rtn import quantize_rtn

K, M, N = 400, (24, 8), 64
SCHEMES = [Scheme(bits, g) for bits in (3, 4, 8) for g in (-1, 32)]


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and gradients, some tokens and rows far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(K, N, generator=generator) @ torch.randn(N, N, generator=generator) / N**0.5
    weight, rows = torch.rand(K, 1, generator=generator) ** 4, torch.rand(1, sum(M), generator=generator) ** 4
    return x, torch.randn(K, sum(M), generator=generator) * weight * rows


def trial(seed: int = 0) -> tuple[Trial, Tensor, Tensor]:
    x, gradient = tokens(seed)
    sensor = Sensor(sum(M), N)
    for part in torch.arange(K).split(90):
        sensor.fit(x[part])
        sensor.judge(x[part], gradient[part])
    generator = torch.Generator().manual_seed(seed + 1)
    weights = {name: torch.randn(m, N, generator=generator) for name, m in zip("ab", M, strict=True)}
    return Trial(weights, sensor.inputs.H("a"), *sensor.curvature("a")), x, gradient


def test_losses_are_those_of_the_definition() -> None:
    tried, x, gradient = trial()
    losses = tried.losses(SCHEMES, Choices(), calibrated=False)
    w = gradient.square().sum(1)
    b = (gradient.square().sum(0) / w.sum()).split(M)
    for scheme in SCHEMES:
        for (name, W), own in zip(tried.weights.items(), b, strict=True):
            Q = dequantize(quantize_rtn(W, scheme), scheme)
            moved = x @ (W - Q).T  # [k, m]
            loss = losses[scheme][name]
            assert loss.kl == pytest.approx(0.5 * float((w.unsqueeze(1) * moved.square() * own).sum()) / K, rel=1e-4)
            assert loss.error == pytest.approx(relative_error(W, Q, x.T @ x / K), rel=1e-4)


def test_sampled_rows_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, *_ = trial()
    exact = tried.losses(SCHEMES, Choices(), calibrated=False)
    monkeypatch.setattr(prediction, "TRIAL_ROWS", 8)
    for scheme, found in tried.losses(SCHEMES, Choices(), calibrated=False).items():
        assert found["b"] == pytest.approx(exact[scheme]["b"])  # it has no more
        assert found["a"].kl == pytest.approx(exact[scheme]["a"].kl, rel=0.7)


def test_gptq_loses_less_and_more_bits_lose_less() -> None:
    tried, *_ = trial()
    solved = tried.losses(SCHEMES, Choices(), calibrated=True)
    rounded = tried.losses(SCHEMES, Choices(), calibrated=False)
    for name in tried.weights:
        assert all(solved[scheme][name].error < rounded[scheme][name].error for scheme in SCHEMES)
        assert solved[Scheme(3, 32)][name].kl > solved[Scheme(4, 32)][name].kl > solved[Scheme(8, 32)][name].kl


def test_finer_scales_err_less() -> None:
    tried, *_ = trial()
    for errors in tried.granularities(4, symmetric=True).values():
        assert list(errors) == ["per-tensor", "per-channel", "g64", "g32"]
        assert errors["per-tensor"] > errors["per-channel"] >= errors["g64"] > errors["g32"]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_prediction_is_the_divergence_of_a_softmax(bits: int) -> None:
    """A model of one linear, logits = W x: each token's predictions depend on its own input alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 32, generator=generator)
    W = torch.randn(16, 32, generator=generator) * 0.2
    p = (x @ W.T).softmax(-1)
    drawn = torch.multinomial(p, 1, generator=generator)
    sensor = Sensor(16, 32)
    sensor.fit(x)
    sensor.judge(x, p.scatter_add(1, drawn, p.new_full(drawn.shape, -1.0)))
    tried = Trial({"a": W}, sensor.inputs.H("a"), *sensor.curvature("a"))
    scheme = Scheme(bits, 32)
    Q = dequantize(quantize_rtn(W, scheme), scheme)
    logp, logq = (x @ W.T).log_softmax(-1), (x @ Q.T).log_softmax(-1)
    measured = float((logp.exp() * (logp - logq)).sum(-1).mean())
    predicted = tried.losses([scheme], Choices(), calibrated=False)[scheme]["a"].kl
    assert predicted == pytest.approx(measured, rel=0.1)
