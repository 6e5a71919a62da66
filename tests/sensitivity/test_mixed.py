"""Mixed precision: within its target, alike where servers fuse, pinned where told to, the same after a kill."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmquant.calibration.prepare import prepare
from llmquant.checkpoint.parts import read_tensors
from llmquant.errors import RecipeError
from llmquant.inspect import inspect_checkpoint
from llmquant.manifest import LOG, MANIFEST, RECIPE
from llmquant.model.layout import derive_layout
from llmquant.observer import Silent
from llmquant.pipeline import open_plan, preview, quantize
from llmquant.plan import Plan, Unit, stored_bits
from llmquant.recipe import Recipe, Target
from llmquant.scheme import Scheme
from llmquant.sensitivity.measure import measure
from llmquant.sensitivity.mixed import Mixture, mix
from llmquant.verify import verify_checkpoint

Recipes = Callable[..., Recipe]


def average_bits(plan: Plan) -> float:
    bits = weights = 0
    for linear in plan.linears:
        size = linear.m * linear.n
        bits += stored_bits(linear.m, linear.n, linear.scheme, "compressed-tensors") if linear.scheme else 16 * size
        weights += size
    return bits / weights


@pytest.fixture(scope="module")
def mixed(tiny_checkpoint: Path, recipe: Recipes) -> Callable[..., Mixture]:
    """`mixed(bits=5)`: from one measurement."""
    shell, plan = open_plan(tiny_checkpoint, recipe())
    found = measure(plan.recipe, shell, prepare(plan.recipe, shell).batches)
    return lambda **target: mix(found, plan, shell, Target(**target))


@pytest.mark.parametrize("bits", [4.3, 5.0, 9.0])
def test_within_the_bits_and_alike_where_servers_fuse(
    bits: float, mixed: Callable[..., Mixture], tiny_checkpoint: Path
) -> None:
    mixture = mixed(bits=bits)
    shell, plan = open_plan(tiny_checkpoint, mixture.recipe)
    assert bits - 0.4 < average_bits(plan) <= bits
    assert mixture.bits_per_weight == pytest.approx(average_bits(plan))
    for layer in derive_layout(shell.config).layers:
        for group in layer.groups:
            assert len({plan.schemes.get(name) for name in group.linears}) == 1


def test_more_bits_lose_less(mixed: Callable[..., Mixture]) -> None:
    losses = [mixed(bits=bits).predicted_kl for bits in (4.3, 4.6, 5.5, 8.5, 16.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0


def test_a_size_is_that_of_the_files(tiny_checkpoint: Path, recipe: Recipes, tmp_path: Path) -> None:
    uniform = open_plan(tiny_checkpoint, recipe())[1].bytes_out
    plan = quantize(tiny_checkpoint, tmp_path / "out", recipe(method="rtn", target={"size": uniform + 20_000}))
    stored = sum(tensor.nbytes for tensor in read_tensors(tmp_path / "out" / "model.safetensors").values())
    assert plan.bytes_out == stored
    assert uniform + 10_000 < stored <= uniform + 20_000


def test_a_divergence_is_kept_to_with_the_fewest_bits(mixed: Callable[..., Mixture]) -> None:
    least = mixed(bits=6.0)
    again = mixed(kl=least.predicted_kl)
    assert again.predicted_kl <= least.predicted_kl
    assert again.bits_per_weight <= 6.0


def test_overrides_pin(tiny_checkpoint: Path, recipe: Recipes) -> None:
    pinned = [{"match": "re:.*layers.0.*", "skip": True}, {"match": "re:.*layers.1.*o_proj", "bits": 8}]
    plan = preview(tiny_checkpoint, recipe(overrides=pinned, target={"bits": 11.0}))
    assert not any("layers.0" in name for name in plan.schemes)
    assert plan.schemes["model.layers.1.self_attn.o_proj"] == Scheme(8, 32)
    assert average_bits(plan) <= 11.0
    assert plan.recipe.target is None
    assert plan.notes[0].startswith("mixed precision: ")


def test_choices_are_kept_to(mixed: Callable[..., Mixture], tiny_checkpoint: Path) -> None:
    _, plan = open_plan(tiny_checkpoint, mixed(bits=4.2, choices=(3, 8)).recipe)
    assert {scheme.bits for scheme in plan.schemes.values()} <= {3, 8}
    assert len(plan.schemes) == 14


@pytest.mark.parametrize("target", [{"bits": 2.0}, {"size": 1000}])
def test_what_cannot_be_reached_is_said(target: dict[str, float], mixed: Callable[..., Mixture]) -> None:
    with pytest.raises(RecipeError, match="target: the smallest choice"):
        mixed(**target)


@pytest.mark.parametrize("target", [{}, {"bits": 4.5, "kl": 0.1}, {"bits": 4.5, "choices": [5]}, {"bits": -1}])
def test_a_target_is_one_thing(target: dict[str, object], recipe: Recipes) -> None:
    with pytest.raises(RecipeError, match="target"):
        recipe(target=target)


class StopAfter(Silent):
    """Stops the run from inside; counts the layers that were measured."""

    def __init__(self, units: int) -> None:
        self.left, self.layers = units, 0

    def sensed(self, layer: str, left: int) -> None:
        self.layers += 1

    def finished(self, unit: Unit) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_checkpoint_of_several_schemes_is_whole_and_the_same_after_a_stop(
    tiny_checkpoint: Path, recipe: Recipes, tmp_path: Path
) -> None:
    wanted = recipe(target={"bits": 5.5})
    plan = quantize(tiny_checkpoint, tmp_path / "whole", wanted)
    assert len(set(plan.schemes.values())) > 1
    assert verify_checkpoint(tmp_path / "whole")
    assert inspect_checkpoint(tmp_path / "whole")["bits_per_weight"] <= 5.5
    assert "mixed precision" in (tmp_path / "whole" / LOG).read_text()
    first, second, third = StopAfter(2), StopAfter(9), StopAfter(9)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_checkpoint, tmp_path / "stopped", wanted, observer=first)
    quantize(tiny_checkpoint, tmp_path / "stopped", wanted, observer=second)
    assert (first.layers, second.layers) == (2, 0)  # what was measured for is not measured again
    assert (tmp_path / "whole" / MANIFEST).read_bytes() == (tmp_path / "stopped" / MANIFEST).read_bytes()
    again = quantize(tiny_checkpoint, tmp_path / "stopped", wanted, observer=third)  # finished: nothing to do
    assert again.schemes == plan.schemes
    assert third.layers == 0


def test_the_recipe_that_is_left_gives_the_same_weights(tiny_checkpoint: Path, recipe: Recipes, tmp_path: Path) -> None:
    quantize(tiny_checkpoint, tmp_path / "asked", recipe(target={"bits": 5.5}))
    left = Recipe.from_yaml(tmp_path / "asked" / RECIPE)
    quantize(tiny_checkpoint, tmp_path / "told", left)
    assert (tmp_path / "asked" / MANIFEST).read_bytes() == (tmp_path / "told" / MANIFEST).read_bytes()
