"""KL divergence and agreement against values worked out by hand and by brute force."""

import copy
import math
from pathlib import Path

import pytest
import torch
from measuring import compared, cut_of
from transformers import AutoModelForCausalLM

from llmquant.evaluate.perplexity import Whole, perplexity

IDS = torch.randint(0, 512, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.fixture
def changed(model):
    """The model with noise on every weight."""
    other = copy.deepcopy(model)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=noise))
    return other


def test_identical_models_do_not_diverge(model):
    both = compared(model, model, IDS)
    kl = both.divergence
    assert (kl.mean_kl, kl.median_kl, kl.p99_kl, kl.max_kl, kl.top1_agreement, kl.positions) == (0, 0, 0, 0, 1, 45)
    assert kl.top10_overlap == 1
    assert torch.equal(both.model.nll, both.baseline.nll)


def test_equals_brute_force(model, changed):
    with torch.no_grad():
        p, q = (m(IDS).logits[:, :-1].double().softmax(-1).flatten(0, 1) for m in (model, changed))
    kl = sorted(
        sum(a * math.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p.tolist(), q.tolist(), strict=True)
    )
    found = compared(changed, model, IDS).divergence
    assert found.mean_kl == pytest.approx(sum(kl) / 45, rel=1e-5)
    assert found.median_kl == pytest.approx(kl[22], rel=1e-5)
    assert found.p99_kl == pytest.approx(kl[44], rel=1e-5)
    assert found.max_kl == pytest.approx(kl[44], rel=1e-5)
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0 < found.top1_agreement < 1
    shared = [
        len(set(a.topk(10).indices.tolist()) & set(b.topk(10).indices.tolist())) / 10 for a, b in zip(p, q, strict=True)
    ]
    assert found.top10_overlap == pytest.approx(sum(shared) / 45)


def test_direction_is_from_the_baseline(model, changed):
    forward = compared(changed, model, IDS).divergence.mean_kl
    backward = compared(model, changed, IDS).divergence.mean_kl
    assert abs(forward - backward) > 1e-4 * forward


def test_against_a_uniform_model_it_is_the_entropy_missing(model):
    """KL(p || uniform) = log(vocab) - H(p)."""
    uniform = copy.deepcopy(model)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    with torch.no_grad():
        logp = model(IDS).logits[:, :-1].double().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).mean()
    found = compared(uniform, model, IDS)
    assert found.divergence.mean_kl == pytest.approx(math.log(512) - float(entropy), rel=1e-6)
    assert found.model.value == pytest.approx(512)


def test_both_perplexities_come_from_the_same_pass(model, changed):
    both = compared(changed, model, IDS)
    assert torch.equal(both.model.nll, perplexity(Whole(changed), cut_of(IDS)).nll)
    assert torch.equal(both.baseline.nll, perplexity(Whole(model), cut_of(IDS)).nll)
    assert both.model.value != both.baseline.value


def test_no_inference_mode_is_left_behind(model):
    compared(model, model, IDS[:1])
    assert not torch.is_inference_mode_enabled()
