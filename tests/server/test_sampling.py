"""How tokens are chosen."""

import pytest

pytest.importorskip("fastapi")

import torch
from transformers import GenerationConfig

from llmquant.errors import NumericsError
from llmquant.server.protocol import Completion
from llmquant.server.sampling import Sampler, Sampling

LOGITS = torch.tensor([0.0, 3.0, 2.5, -1.0, 1.0])


def drawn(logits: torch.Tensor = LOGITS, count: int = 4000, **how: float) -> torch.Tensor:
    sampler = Sampler(Sampling(seed=0, **how))
    return torch.bincount(torch.tensor([sampler.choose(logits, [0]) for _ in range(count)]), minlength=5) / count


def test_temperature_0_is_the_most_likely_token() -> None:
    assert drawn(temperature=0, count=5)[1] == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_model_s_probabilities(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(0)
    assert torch.allclose(drawn(temperature=temperature), expected, atol=0.03)


def test_top_k_and_top_p_leave_the_others_out() -> None:
    assert (drawn(top_k=2) > 0).tolist() == [False, True, True, False, False]
    assert (drawn(top_p=0.5) > 0).tolist() == [False, True, False, False, False]


def test_repetition_is_punished_when_greedy_too() -> None:
    assert Sampler(Sampling(temperature=0)).choose(LOGITS, [1]) == 1
    assert Sampler(Sampling(temperature=0, repetition_penalty=2.0)).choose(LOGITS, [1]) == 2


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    flat = torch.zeros(50000)
    choose = lambda seed: Sampler(Sampling(seed=seed)).choose(flat, [0])  # noqa: E731
    assert choose(7) == choose(7)
    assert len({choose(None) for _ in range(8)}) > 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_choose_nothing(value: float, temperature: float) -> None:
    with pytest.raises(NumericsError, match="not finite"):
        Sampler(Sampling(temperature)).choose(LOGITS.index_fill(0, torch.tensor(2), value), [0])


def test_the_request_is_before_the_model_s_recommendation() -> None:
    config = GenerationConfig(temperature=0.6, top_k=20)
    asked = Completion(model="m", prompt="", temperature=0.2)
    assert Sampling.of(asked, config) == Sampling(0.2, 1.0, 20)
    assert Sampling.of(Completion(model="m", prompt="", top_k=0), config) == Sampling(0.6, 1.0, 0)
    assert Sampling.of(Completion(model="m", prompt=""), GenerationConfig()) == Sampling(seed=None)
