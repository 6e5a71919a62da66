"""The way back through a model that is never whole in memory, against one backward pass of the whole model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant.calibration.batches import Batch
from llmquant.calibration.round_trip import RoundTrip, Tap
from llmquant.checkpoint.reader import Checkpoint
from llmquant.model.layout import derive_layout
from llmquant.model.shell import Shell

GENERATOR = torch.Generator().manual_seed(0)


def batch(*lengths: int) -> Batch:
    """Sequences padded on the right."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return Batch(torch.randint(3, 512, mask.shape, generator=GENERATOR) * mask, mask)


BATCHES = (batch(24), batch(20, 13))


def round_trip(model: Path, spill: Path | None = None, probed: tuple[int, ...] = (0, 1)) -> tuple[RoundTrip, list[Tap]]:
    shell, taps = Shell(Checkpoint.open(model)), list[Tap]()
    trip = RoundTrip(shell, derive_layout(shell.config).layers, BATCHES, probed, spill=spill)
    names = [layer.name for layer in trip.backward(taps.append, seed=3)]
    assert names == [layer.name for layer in reversed(trip.layers)]
    assert all(parameter.is_meta for parameter in shell.model.parameters())
    return trip, taps


def whole(model: Path) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Input and output gradient of each linear by batch, from autograd through the whole model."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    passed: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: object, args: tuple[Tensor, ...], out: Tensor) -> None:
            out.retain_grad()
            passed.setdefault(name, []).append((args[0].detach(), out))

        return hook

    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(note(name))
    generator = torch.Generator().manual_seed(3)
    for each in BATCHES:
        logp = loaded(input_ids=each.input_ids, use_cache=False).logits.log_softmax(-1)
        drawn = torch.multinomial(logp.detach().exp().flatten(0, 1), 1, generator=generator).view(each.mask.shape)
        (-logp.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)[each.mask]).sum().backward()
    return passed


@pytest.mark.parametrize(
    "options", [{"arch": "llama"}, {"arch": "gemma2"}, {"arch": "gpt_neox"}, {"arch": "opt"}, {"tied": 1}], ids=str
)
def test_inputs_and_gradients_are_those_of_the_whole_model(
    options: dict[str, object], make_checkpoint: Callable[..., Path]
) -> None:
    model = make_checkpoint(**options)
    trip, taps = round_trip(model)
    expected = whole(model)
    assert trip.tokens == 24 + 20 + 13
    assert len(taps) == len(BATCHES) * sum(len(layer.groups) for layer in trip.layers)
    seen = dict.fromkeys(expected, 0)
    for tap in taps:
        assert tap.gradient is not None
        gradients = tap.gradient.split([expected[name][0][1].shape[-1] for name in tap.group.linears], dim=1)
        for name, gradient in zip(tap.group.linears, gradients, strict=True):
            x, out = expected[name][seen[name]]
            mask = BATCHES[seen[name]].mask
            seen[name] += 1
            torch.testing.assert_close(tap.x, x.view(*mask.shape, -1)[mask], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(gradient, out.grad.view(*mask.shape, -1)[mask], rtol=1e-3, atol=1e-4)


def test_batches_that_are_not_probed_give_their_inputs_alone(tiny_checkpoint: Path) -> None:
    _, taps = round_trip(tiny_checkpoint)
    _, some = round_trip(tiny_checkpoint, probed=(0,))
    for number, (tap, other) in enumerate(zip(taps, some, strict=True)):
        assert torch.equal(tap.x, other.x)
        probed = number % 8 < 4  # four groups of each layer, the first batch before the second
        assert (other.gradient is not None) == probed
        if other.gradient is not None:
            assert torch.equal(tap.gradient, other.gradient)


def test_states_may_go_through_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    _, taps = round_trip(tiny_checkpoint)
    _, spilled = round_trip(tiny_checkpoint, spill=tmp_path)
    for tap, other in zip(taps, spilled, strict=True):
        assert torch.equal(tap.gradient, other.gradient)
    assert not list(tmp_path.iterdir())
