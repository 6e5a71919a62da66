"""What is said of each linear, and whether the prediction is what happens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmquant.calibration.prepare import prepare
from llmquant.pipeline import open_plan, quantize, sense
from llmquant.recipe import Recipe
from llmquant.runtime.loader import load
from llmquant.scheme import Scheme
from llmquant.sensitivity.isolated import SEQUENCES

Recipes = Callable[..., Recipe]


def test_every_linear_and_every_scheme_that_fits(tiny_checkpoint: Path, recipe: Recipes) -> None:
    found, mixture = sense(tiny_checkpoint, recipe())
    assert mixture is None
    assert len(found.linears) == 14
    assert [len(group) for group in found.groups] == [3, 1, 2, 1] * 2
    assert found.tokens == 480
    for linear in found.linears:
        sizes = (-1, 32, 64) if linear.n == 64 else (-1, 32, 64, 128)
        assert set(linear.losses) == {Scheme(bits, g) for bits in (3, 4, 8) for g in sizes}
        assert all(loss.kl >= 0 and loss.error >= 0 for loss in linear.losses.values())
        assert linear.losses[Scheme(3, 32)].kl > linear.losses[Scheme(4, 32)].kl > linear.losses[Scheme(8, 32)].kl
        assert linear.assigned == Scheme(4, 32)
        assert linear.inputs.max_to_median >= 1


def test_asymmetric_schemes_for_an_asymmetric_recipe(tiny_checkpoint: Path, recipe: Recipes) -> None:
    found, _ = sense(tiny_checkpoint, recipe(method="rtn", scheme={"group_size": 64, "symmetric": False}))
    assert {scheme.symmetric for linear in found.linears for scheme in linear.losses} == {False}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_predicted_and_measured_divergence_of_one_layer(method: str, tiny_checkpoint: Path, recipe: Recipes) -> None:
    """Random weights and few tokens: of the right size is what can be asked for."""
    found, _ = sense(tiny_checkpoint, recipe(method=method), isolated=True)
    assert [each.layer for each in found.isolated] == ["model.layers.0", "model.layers.1"]
    for each in found.isolated:
        assert each.predicted == pytest.approx(each.measured, rel=0.5)
    assert found.correlation is not None


def test_the_measured_divergence_is_that_of_a_model_with_one_layer_quantized(
    tiny_checkpoint: Path, recipe: Recipes, tmp_path: Path
) -> None:
    """Through another door: quantize to a directory, load both, compare."""
    wanted = recipe(method="rtn")
    found, _ = sense(tiny_checkpoint, wanted, isolated=True)
    alone = recipe(method="rtn", overrides=[{"match": "re:.*layers.0.*", "skip": True}])
    quantize(tiny_checkpoint, tmp_path / "out", alone)
    shell, _ = open_plan(tiny_checkpoint, wanted)
    ids = torch.cat([batch.input_ids for batch in prepare(wanted, shell).batches[:SEQUENCES]])
    with torch.no_grad():
        logp, logq = (
            load(directory, torch.float32)(input_ids=ids).logits.log_softmax(-1)
            for directory in (tiny_checkpoint, tmp_path / "out")
        )
    expected = float((logp.exp() * (logp - logq)).sum(-1).mean())
    assert found.isolated[1].measured == pytest.approx(expected, rel=0.2)
