"""A recipe is strict: what it does not know, it refuses, with the nearest name."""

from pathlib import Path

import pytest
import yaml

from llmquant.errors import RecipeError
from llmquant.recipe import Override, Recipe
from llmquant.scheme import Scheme


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"methd": "gptq"}, "methd: unknown key; did you mean 'method'"),
        ({"method": "gptqq"}, "method: Input should be 'rtn', 'awq', 'gptq', 'awq+gptq' or 'auto'"),
        ({"scheme": {"bits": 5}}, "bits: 5 is not supported"),
        ({"scheme": {"bits": 4, "groupsize": 64}}, "scheme.groupsize: unknown key; did you mean 'group_size'"),
        ({"scheme": {"group_size": 100}}, "group_size: 100 is not supported"),
        ({"calibration": {"samples": 0}}, "calibration.samples"),
        ({"overrides": [{"match": "re:("}]}, "not a regular expression"),
        ({"overrides": [{"skip": True}]}, "overrides.0.match"),
        ({"version": 2}, "version"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_what_it_refuses(values: dict, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(values, "r.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "method: [", "just words", "", "\x00"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        Recipe.from_yaml(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        Recipe.from_yaml(tmp_path / "none.yaml")


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(
        {
            "method": "rtn",
            "scheme": {"bits": 8, "group_size": -1},
            "overrides": [{"match": "re:.*o_proj", "skip": True}],
        }
    )
    path = tmp_path / "r.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(path) == recipe
    assert yaml.safe_load(recipe.to_yaml())["scheme"]["group_size"] == -1


def test_expressions_match_whole_names() -> None:
    assert Override(match="re:.*down_proj").matches("model.layers.0.mlp.down_proj")
    assert not Override(match="re:down").matches("model.layers.0.mlp.down_proj")
    assert Override(match="lm_head").matches("lm_head")
    assert not Override(match="model.layers.1").matches("model.layers.11")


def test_an_override_changes_only_what_it_names() -> None:
    assert Override(match="x", group_size=32).apply(Scheme(4, 128, False), Scheme()) == Scheme(4, 32, False)
    assert Override(match="x", symmetric=False).apply(None, Scheme(8, 64)) == Scheme(8, 64, False)
    assert Override(match="x", skip=True).apply(Scheme(), Scheme()) is None
