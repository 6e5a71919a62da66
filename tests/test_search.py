"""The ladder of `--max-increase`: what it tries, what it keeps, what it does not do twice, what it may cost."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmquant.errors import GateError, OutputError, RecipeError
from llmquant.evaluate.protocol import Request
from llmquant.evaluate.run import evaluate
from llmquant.evaluate.text import Source
from llmquant.manifest import ATTEMPTS
from llmquant.observer import Silent
from llmquant.pipeline import Options, open_plan
from llmquant.recipe import Recipe
from llmquant.search import STEPS, Attempt, Target, more_bits, search
from llmquant.verify import verify_checkpoint

RTN = Recipe.from_dict({"method": "rtn", "scheme": {"bits": 3, "group_size": 64}})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    letters = torch.randint(97, 123, (9000,), generator=torch.Generator().manual_seed(0))
    path.write_text("".join(map(chr, letters.tolist())))
    return path


@pytest.fixture(scope="module")
def model(make_checkpoint) -> Path:
    return make_checkpoint(layers=3)


def run(model: Path, out: Path, text: Path, bound: float, **budget: object) -> list[Attempt]:
    seen: list[Attempt] = []
    target = Target(bound, Source(text), 4, **budget)
    search(str(model), out, RTN, Options(), target, Silent(), seen.append)
    return seen


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the step that takes longest."""
    monkeypatch.delitem(STEPS, "trained rounding")


def test_it_stops_where_the_bound_holds_and_says_what_it_took(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen = run(model, out, text, 1e9)
    assert [attempt.name for attempt in seen] == ["as asked"]
    assert not (tmp_path / "out.attempts").exists()
    verify_checkpoint(out)
    measured = evaluate(out, text_file=text, request=Request(seq_len=2048, max_windows=4), baseline=model)
    assert seen[0].increase == pytest.approx(measured.increase, abs=1e-9)
    record = json.loads((out / ATTEMPTS).read_text())
    assert record["attempts"][0]["increase"] == seen[0].increase


def test_one_that_cannot_be_met_keeps_the_best_and_a_later_search_goes_on(
    model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(GateError, match=r"not reached in \d attempts; the best, in .*: .* bits per weight") as caught:
        run(model, out, text, -1.0, max_bits=6.0)
    assert caught.value.exit_code == 3
    verify_checkpoint(out)
    attempts = [Attempt(**attempt) for attempt in json.loads((out / ATTEMPTS).read_text())["attempts"]]
    names = [attempt.name for attempt in attempts]
    assert names == ["as asked", "groups of 32", *(f"8 bits for {s}% of the weights" for s in (12, 25, 50, 100))]
    assert [attempt.increase is None for attempt in attempts] == [a.bits_per_weight > 6.0 for a in attempts]
    best = min((a for a in attempts if a.increase is not None), key=lambda a: a.increase)
    assert Recipe.from_yaml(out / "llmquant_recipe.yaml").model_dump(mode="json") == best.recipe

    again = run(model, out, text, best.increase)  # now with a bound that holds: nothing is made anew
    assert (again[-1].increase, len(again)) == (best.increase, 1)
    verify_checkpoint(out)


def test_all_weights_at_8_bits_are_close(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError):
        run(model, tmp_path / "out", text, -1.0)
    attempts = json.loads((tmp_path / "out" / ATTEMPTS).read_text())["attempts"]
    assert abs(attempts[-1]["increase"]) < 0.005
    assert max(abs(a["increase"]) for a in attempts[:2]) > 0.01


def test_the_worst_get_more_bits_with_those_that_share_their_input(model: Path) -> None:
    plan = open_plan(model, RTN)[1]
    errors = dict.fromkeys(plan.schemes, 0.01) | {"model.layers.1.self_attn.k_proj": 0.5}
    wanted = more_bits(RTN, plan, errors, 0.01)
    assert [override.match.rpartition(".")[2] for override in wanted.overrides] == ["q_proj", "k_proj", "v_proj"]
    assert {override.bits for override in wanted.overrides} == {8}
    everything = more_bits(RTN, plan, errors, 1.0)
    assert set(open_plan(model, everything)[1].schemes.values()) == {replace(RTN.scheme, bits=8)}


def test_a_foreign_output_is_left_alone(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letters.txt").write_text("mine")
    with pytest.raises(OutputError, match="choose another -o"):
        run(model, tmp_path / "out", text, 1.0)
    assert (tmp_path / "out" / "letters.txt").read_text() == "mine"


def test_without_a_text_nothing_can_be_measured(model: Path, tmp_path: Path) -> None:
    target = Target(0.05, Source())
    with pytest.raises(RecipeError, match="give one of the two"):
        search(str(model), tmp_path / "out", RTN, Options(), target, Silent(), lambda _: None)
    assert not (tmp_path / "out").exists()
