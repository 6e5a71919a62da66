"""Perplexity against values worked out by hand and by brute force."""

import math
from pathlib import Path

import pytest
import torch
from measuring import cut_of
from transformers import AutoModelForCausalLM

from llmquant.errors import NumericsError
from llmquant.evaluate import perplexity as module
from llmquant.evaluate.perplexity import Whole, log_probs, perplexity
from llmquant.evaluate.protocol import Window


@pytest.fixture
def model(tiny_checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 512, (3, 16), generator=torch.Generator().manual_seed(0))


def test_uniform_logits_give_the_vocabulary_size(model, ids):
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(Whole(model), cut_of(ids))
    assert result.value == pytest.approx(512, rel=1e-12)
    assert result.nll.tolist() == pytest.approx([math.log(512)] * 45)


def test_equals_brute_force(model, ids):
    nll = []
    with torch.no_grad():
        for window in ids:
            for t in range(1, len(window)):  # one forward per position, no future in sight
                logits = model(window[None, :t]).logits[0, -1].double()
                nll.append(float(logits.logsumexp(0) - logits[window[t]]))
    result = perplexity(Whole(model), cut_of(ids))
    assert result.value == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-6)
    assert result.nll.tolist() == pytest.approx(nll, rel=1e-4)


def test_certain_model_has_perplexity_one(model):
    """A head that says what the embedding says: after token 7, token 7 for sure."""
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.randn(512, 64, generator=torch.Generator().manual_seed(1)))
        model.lm_head.weight.copy_(100 * model.model.embed_tokens.weight)
    assert perplexity(Whole(model), cut_of(torch.full((1, 16), 7))).value == pytest.approx(1.0)


def test_pieces_do_not_change_the_numbers(model, ids, monkeypatch):
    whole = perplexity(Whole(model), cut_of(ids)).nll
    monkeypatch.setattr(module, "PIECE", 512 * 4)
    (logits,) = Whole(model).logits([ids[0, :-1]])
    pieces = list(log_probs(logits, Window(ids[0], 15), "model"))
    assert [logp.shape[0] for _, logp in pieces] == [4, 4, 4, 3]
    assert torch.equal(torch.cat([after for after, _ in pieces]).flatten(), ids[0, 1:])
    assert torch.allclose(perplexity(Whole(model), cut_of(ids)).nll, whole, rtol=1e-12)


def test_a_dropped_iterator_leaves_gradients_on(model, ids):
    next(Whole(model).logits([ids[0]]))
    assert torch.is_grad_enabled()


def test_only_the_last_tokens_of_a_window_count(model, ids):
    """What is predicted of a window is the end of what all of it gives."""
    whole = perplexity(Whole(model), cut_of(ids)).nll.view(3, 15)
    text = cut_of(ids)
    half = text._replace(windows=[Window(window.ids, 7) for window in text.windows])
    assert torch.allclose(perplexity(Whole(model), half).nll.view(3, 7), whole[:, 8:], rtol=1e-12)


def test_nan_logits_are_an_error(model, ids):
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(NumericsError, match="NaN or Inf"):
        perplexity(Whole(model), cut_of(ids))
