"""The ladder of `--max-increase`: what it tries, what it keeps, what it does not do twice, what it may cost."""

import json
from pathlib import Path

import pytest
import torch

from llmquant.errors import GateError, OutputError, RecipeError
from llmquant.evaluate.protocol import Request
from llmquant.evaluate.run import evaluate
from llmquant.evaluate.text import Source
from llmquant.manifest import ATTEMPTS
from llmquant.observer import Silent
from llmquant.pipeline import Options
from llmquant.recipe import Recipe
from llmquant.search import MORE_BITS, Attempt, Target, search
from llmquant.verify import verify_checkpoint

RTN = Recipe.from_dict(
    {"method": "rtn", "scheme": {"bits": 3, "group_size": 64}, "calibration": {"samples": 4, "seq_len": 64}}
)


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
    search(str(model), out, RTN, Options(), target, Silent(), seen.append).require()
    return seen


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
    uniform = min(attempts[:3], key=lambda a: a.increase).bits_per_weight
    mixed = [f"mixed precision of {uniform + more:.2f} bits" for more in MORE_BITS]
    assert names == ["as asked", "groups of 32", "the best of all methods", *mixed]
    for attempt, more in zip(attempts[3:], MORE_BITS, strict=True):
        assert uniform < attempt.bits_per_weight <= uniform + more
    assert attempts[-1].increase is None  # over the budget
    assert [attempt.increase is None for attempt in attempts] == [a.bits_per_weight > 6.0 for a in attempts]
    best = min((a for a in attempts if a.increase is not None), key=lambda a: a.increase)
    assert Recipe.from_yaml(out / "llmquant_recipe.yaml").model_dump(mode="json") == best.recipe

    again = run(model, out, text, best.increase)  # now with a bound that holds: nothing is made anew
    assert (again[-1].increase, len(again)) == (best.increase, 1)
    verify_checkpoint(out)

    small = run(model, out, text, 1e9, max_bits=3.3)  # the best had more bits: what was removed for it comes back
    assert [attempt.bits_per_weight for attempt in small] == [attempts[0].bits_per_weight]
    assert Recipe.from_yaml(out / "llmquant_recipe.yaml").model_dump(mode="json") == attempts[0].recipe
    verify_checkpoint(out)


def test_mixtures_of_experts_end_with_8_bits(make_checkpoint, text: Path, tmp_path: Path) -> None:
    """Their losses are not measured one by one, so that there is no mixed precision to climb on to."""
    seen: list[Attempt] = []
    target = Target(-1.0, Source(text), 4)
    search(str(make_checkpoint(arch="mixtral")), tmp_path / "out", RTN, Options(), target, Silent(), seen.append)
    assert [attempt.name for attempt in seen] == ["as asked", "groups of 32", "the best of all methods", "8 bits"]
    assert seen[-1].bits_per_weight == 8.5
    assert seen[-1].increase == min(attempt.increase for attempt in seen)
    verify_checkpoint(tmp_path / "out")


class StopIn(Silent):
    """Stops the search from inside its n-th attempt, as a kill would from outside."""

    def __init__(self, attempt: int) -> None:
        self._left = attempt

    def planned(self, *_: object, **__: object) -> None:
        self._left -= 1

    def finished(self, unit: object) -> None:
        if not self._left:
            raise InterruptedError


def test_a_stopped_search_goes_on_inside_of_its_attempt(model: Path, text: Path, tmp_path: Path) -> None:
    out, target = tmp_path / "out", Target(-1.0, Source(text), 4, max_bits=3.6)
    with pytest.raises(InterruptedError):
        search(str(model), out, RTN, Options(), target, StopIn(2), lambda _: None)
    assert not out.exists()
    (before,) = json.loads((tmp_path / "out.attempts" / ATTEMPTS).read_text())["attempts"]
    outcome = search(str(model), out, RTN, Options(), target, Silent(), lambda _: None)
    assert not outcome.held
    json.dumps(outcome.to_dict(), allow_nan=False)
    first, second, *_ = json.loads((out / ATTEMPTS).read_text())["attempts"]
    assert first == before  # its time, too: it was not made again
    assert second["name"] == "groups of 32"
    verify_checkpoint(out)
    assert not (tmp_path / "out.attempts").exists()


def test_more_bits_lose_less(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError):
        run(model, tmp_path / "out", text, -1.0)
    attempts = json.loads((tmp_path / "out" / ATTEMPTS).read_text())["attempts"]
    lost = [abs(attempt["increase"]) for attempt in attempts]
    assert lost[-1] < 0.3 * max(lost[:3])


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


def test_a_target_of_its_own_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_dict({"target": {"bits": 4.5}})
    with pytest.raises(RecipeError, match="--max-increase: chooses mixed precision by itself"):
        search(str(model), tmp_path / "out", recipe, Options(), Target(0.05, Source(text)), Silent(), lambda _: None)
