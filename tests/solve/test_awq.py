"""AWQ's scales against trying them one by one, and what the methods promise of each other."""

from typing import Any

import pytest
import torch

from llmquant.scheme import GROUP_SIZES, Scheme, dequantize
from llmquant.solve.awq import gram_loss, powers_of_two, rounded, search_scales
from llmquant.solve.methods import Choices, Problem, compare, held_out_error, solve
from llmquant.solve.moments import energy, relative_error
from llmquant.solve.rtn import quantize_rtn


def inputs(n: int = 128, seed: int = 0) -> torch.Tensor:
    """A few columns are a hundred times as large as the others: what AWQ is for."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.ones(n)
    size[torch.randperm(n, generator=generator)[:6]] = 100.0
    return torch.randn(1024, n, generator=generator) * size


def problem(m: int = 24, n: int = 128, seed: int = 0, **options: Any) -> Problem:
    X = inputs(n, seed)[:800]
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed + 1)) * 0.05
    scheme, settle = options.pop("scheme", Scheme(4, 32)), options.pop("settle", lambda s: s)
    return Problem(W, scheme, Choices(**options), X.T @ X / 800, settle=settle)


def test_the_search_finds_the_best_of_what_it_tries() -> None:
    p = problem()
    tried: list[torch.Tensor] = []

    def settle(s: torch.Tensor) -> torch.Tensor:
        tried.append(s)
        return s

    s = search_scales(p.W, p.H, p.scheme, settle, gram_loss(p.W, p.H))
    losses = [energy(p.W - rounded(p.W, other, p.scheme), p.H) for other in (torch.ones(128), *tried)]
    assert energy(p.W - rounded(p.W, s, p.scheme), p.H) == pytest.approx(min(losses), rel=1e-5)
    assert min(losses) < 0.8 * losses[0]


def test_gram_form_is_the_error_of_the_outputs() -> None:
    X, W = torch.randn(50, 32).double(), torch.randn(8, 32).double()
    Q = W + 0.1 * torch.randn(8, 32).double()
    assert gram_loss(W, X.T @ X)(Q) == pytest.approx(float((X @ (W - Q).T).square().sum()))


def test_scales_are_powers_of_two_around_one() -> None:
    s = powers_of_two(torch.tensor([0.0, 1e-3, 0.5, 1.0, 700.0]))
    assert torch.equal(s.log2(), s.log2().round())
    assert s.log2().amax() == -s.log2().amin()
    assert s[0] == s[1]
    assert torch.equal(powers_of_two(torch.zeros(4)), torch.ones(4))


def test_what_cannot_be_folded_is_not_scaled() -> None:
    p = problem()
    nothing = Problem(p.W, p.scheme, p.choices, p.H, settle=torch.ones_like)
    assert nothing.scales is None
    assert Problem(p.W, p.scheme, p.choices, p.H).scales is None


@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
@pytest.mark.parametrize("scheme", [Scheme(4, g, sym) for g in GROUP_SIZES for sym in (True, False)], ids=str)
def test_every_method_beats_rounding(method: str, scheme: Scheme) -> None:
    p = problem(scheme=scheme)
    solution = solve(p, method)
    rtn = dequantize(quantize_rtn(p.W, scheme), scheme)
    assert relative_error(p.W, solution.weight(scheme), p.H) < 0.9 * relative_error(p.W, rtn, p.H)
    assert solution.method == method


def test_scales_bring_gptq_closer_where_a_few_columns_carry_all() -> None:
    p = problem()
    with_scales, without = solve(p, "awq+gptq"), solve(p, "gptq")
    assert with_scales.fold is not None
    assert relative_error(p.W, with_scales.weight(p.scheme), p.H) < relative_error(p.W, without.weight(p.scheme), p.H)


def test_candidates_are_compared_by_their_outputs() -> None:
    p, x = problem(), inputs()[800:]
    error = held_out_error(p.W, x, x)
    errors = compare(p, x, x)
    assert list(errors) == ["gptq", "awq", "awq+gptq"]
    for method in errors:
        assert errors[method] == pytest.approx(error(solve(p, method).weight(p.scheme)), rel=1e-5)


def test_without_scales_there_are_fewer_candidates() -> None:
    p, x = problem(settle=None), inputs()[800:]
    assert list(compare(p, x, x)) == ["gptq", "awq"]


def test_held_out_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, original = (torch.randn(40, 16, generator=generator) for _ in range(2))
    W, Q = (torch.randn(8, 16, generator=generator) for _ in range(2))
    expected = (original @ W.T - x @ Q.T).square().sum() / (original @ W.T).square().sum()
    assert held_out_error(W, x, original)(Q) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "choices",
    [{"order": "static"}, {"order": "static", "weight": "pivot"}, {"shrinkage": 0.3}, {"damping": 0.1}, {"refine": 2}],
    ids=str,
)
def test_every_choice_is_heard(choices: dict[str, object]) -> None:
    p, plain = problem(**choices), problem()
    one, other = solve(p, "gptq"), solve(plain, "gptq")
    assert not torch.equal(one.weight(p.scheme), other.weight(p.scheme))
    assert relative_error(p.W, one.weight(p.scheme), p.H) < 2 * relative_error(p.W, other.weight(p.scheme), p.H)
    if "refine" in choices:
        assert relative_error(p.W, one.weight(p.scheme), p.H) < relative_error(p.W, other.weight(p.scheme), p.H)


def test_shrinkage_errs_less_on_another_text_where_there_are_few_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(128) + 0.1 * torch.randn(128, 128, generator=generator)
    seen, other = (torch.randn(k, 128, generator=generator) @ mix for k in (160, 4000))
    W, scheme = torch.randn(64, 128, generator=generator) * 0.05, Scheme(4, 32)
    errors = []
    for shrinkage in (0.0, 0.3):
        p = Problem(W, scheme, Choices(shrinkage=shrinkage), seen.T @ seen / 160)
        Q = solve(p, "gptq").weight(scheme)
        errors.append(relative_error(W, Q, other.T @ other / 4000))
    assert errors[1] < 0.95 * errors[0]
