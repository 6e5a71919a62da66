"""Experts as linears: what transformers computes, whoever is called for whom."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmquant.errors import ArchitectureError
from llmquant.model.experts import (
    CalibratedExperts,
    Experts,
    has_experts,
    routed,
    routers,
    sent,
    unfuse,
    without_guests,
)

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))
from make_tiny import Spec, random_model

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3"]
INPUT = torch.arange(3, 51).reshape(2, 24)


def unfused(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """A copy with experts of linears that hold the same weights."""
    twin = copy.deepcopy(model)
    unfuse(twin, **options)
    for name, module in twin.named_modules():
        if isinstance(module, Experts):
            fused = model.get_submodule(name)
            for expert, gate_up, down in zip(module, fused.gate_up_proj, fused.down_proj, strict=True):
                expert.gate_proj.weight.data, expert.up_proj.weight.data = gate_up.data.chunk(2)
                expert.down_proj.weight.data = down.data
    return twin


@pytest.fixture(scope="module")
def experts() -> CalibratedExperts:
    """Eight experts of one layer."""
    model = unfused(random_model(Spec(arch="qwen3_moe", dtype="float32")), calibrated=True)
    return model.model.layers[0].mlp.experts


def route(tokens: int, k: int = 2, count: int = 8) -> tuple[Tensor, Tensor]:
    scores = torch.rand(tokens, count, generator=torch.Generator().manual_seed(1)).topk(k)
    return scores.indices, scores.values


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("arch", MIXTURES)
def test_the_model_computes_what_it_did(arch: str, calibrated: bool) -> None:
    model = random_model(Spec(arch=arch, dtype="float32")).eval()
    twin = unfused(model, calibrated=calibrated)
    assert has_experts(twin)
    assert not has_experts(model)
    with torch.inference_mode():
        assert torch.allclose(twin(INPUT).logits, model(INPUT).logits, rtol=1e-4, atol=1e-5)


def test_the_tokens_of_each_expert_in_order() -> None:
    index = torch.tensor([[2, 0], [2, 4], [0, 2], [1, 4]])  # of four experts: 4 is nobody's
    found = [(expert, tokens.tolist(), places.tolist()) for expert, tokens, places in sent(index, 4)]
    assert found == [(0, [0, 2], [1, 0]), (1, [3], [0]), (2, [0, 1, 2], [0, 0, 1])]


def test_an_expert_without_tokens_is_called_while_calibrating_alone(experts: CalibratedExperts) -> None:
    called: list[tuple[int, int, int]] = []
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, n=n: called.append((n, len(args[0]), routed(args[0]).chosen)))
        for n, expert in enumerate(experts)
        for linear in (expert.gate_proj, expert.down_proj)
    ]
    x, index, weights = torch.randn(13, 64), torch.zeros(13, 1, dtype=torch.int64), torch.ones(13, 1)
    out = experts(x, index, weights)
    for hook in hooks:
        hook.remove()
    # All tokens chose the first; guests are every eighth token, from another one on for each expert.
    guests = [len(range(n, 13, 8)) for n in range(8)]
    assert called == [(n, guests[n] + 13 * (n == 0), 13 * (n == 0)) for n in range(8) for _ in range(2)]
    plain = copy.deepcopy(experts)
    without_guests(plain)
    seen: list[int] = []
    plain[3].gate_proj.register_forward_pre_hook(lambda *_: seen.append(3))
    assert type(plain) is Experts
    assert torch.allclose(plain(x, index, weights), out, rtol=1e-5, atol=1e-6)
    assert seen == []


def test_inputs_say_whose_they_are(experts: CalibratedExperts) -> None:
    x, (index, weights) = torch.randn(20, 64), route(20)
    inputs: list[Tensor] = []
    hook = experts[5].gate_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    experts(x, index, weights)
    hook.remove()
    (seen,) = inputs
    own, guests = (index == 5).any(1).nonzero().flatten(), torch.arange(5 % 4, 20, 4)
    assert routed(seen).chosen == len(own)
    assert torch.equal(routed(seen).tokens, torch.cat([own, guests]))
    assert torch.equal(seen, x[routed(seen).tokens])
    assert routed(x) is None


def test_gradients_reach_the_experts_that_were_chosen(experts: CalibratedExperts) -> None:
    plain = copy.deepcopy(experts)
    without_guests(plain)
    index, weights = route(20)
    x = torch.randn(20, 64, requires_grad=True)
    plain(x, index, weights).square().sum().backward()
    dense = sum((weights * (index == n)).sum(1, keepdim=True) * expert(x.detach()) for n, expert in enumerate(plain))
    assert torch.allclose(dense, plain(x.detach(), index, weights), rtol=1e-5, atol=1e-6)
    chosen_ones = set(index.flatten().tolist())
    assert {n for n, expert in enumerate(plain) if expert.up_proj.weight.grad is not None} == chosen_ones
    assert bool(x.grad.abs().sum(1).all())


def test_other_shapes_are_refused(experts: CalibratedExperts) -> None:
    plain = copy.deepcopy(experts)
    without_guests(plain)
    x, (index, weights) = torch.randn(20, 64), route(20)
    for call in (plain, experts, plain.everywhere):
        for given in ((x[None], index, weights), (x, index.T, weights.T), (x, index, weights[:, :1])):
            with pytest.raises(ValueError, match=r"experts: .* are no tokens, their experts and their weights"):
                call(*given)


def test_a_gate_of_another_kind_is_kept() -> None:
    family = pytest.importorskip("transformers.models.minimax_m3_vl", reason="an older transformers")
    sizes = {"num_local_experts": 8, "hidden_size": 64, "intermediate_size": 32}
    torch.manual_seed(0)
    block = nn.Module()
    block.experts = family.modeling_minimax_m3_vl.MiniMaxM3VLExperts(
        family.MiniMaxM3VLTextConfig(**sizes, swiglu_limit=0.5)  # so low that it shows
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, (index, weights) = torch.randn(20, 64), route(20)
    expected, found = (each.experts(x, index, weights) for each in (block, unfused(block)))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_experts_without_a_router_are_refused() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

    with pytest.raises(ArchitectureError, match="experts: experts without a router"):
        routers(Layer())
