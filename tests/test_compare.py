"""Checkpoints side by side: the figures are those of `evaluate`, the front is the front."""

import json
from pathlib import Path

import pytest

from llmquant.compare import Entry, compare_checkpoints, pareto, plot, show_comparison
from llmquant.errors import RecipeError
from llmquant.evaluate.protocol import Request
from llmquant.evaluate.run import evaluate
from llmquant.evaluate.text import Source
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe

SHORT = Request(seq_len=32, max_windows=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Side by side, one beside the other. " * 40)
    return path


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """3, 4 and 8 bits."""
    directory, made = tmp_path_factory.mktemp("packed"), []
    for bits, group_size in ((3, 32), (4, 32), (8, 32)):
        made.append(directory / f"w{bits}g{group_size}")
        recipe = {"method": "rtn", "scheme": {"bits": bits, "group_size": group_size}}
        quantize(tiny_checkpoint, made[-1], Recipe.from_dict(recipe))
    return made


@pytest.fixture(scope="module")
def entries(packed: list[Path], tiny_checkpoint: Path, text: Path) -> list[Entry]:
    return compare_checkpoints(packed, Source(text), SHORT, baseline=tiny_checkpoint, speed=False)


def test_figures_are_those_of_evaluate(entries: list[Entry], packed: list[Path], tiny_checkpoint: Path, text: Path):
    assert [entry.name for entry in entries] == list(map(str, [tiny_checkpoint, *packed]))
    assert [entry.bits_per_weight for entry in entries] == [16, 3.5, 4.5, 8.5]
    first = evaluate(packed[0], text_file=text, request=SHORT, baseline=tiny_checkpoint)
    assert entries[1].found.to_dict() == first.to_dict()
    assert entries[0].found.perplexity.value == first.baseline.value
    assert entries[0].point is None
    assert entries[1].bytes == sum(file.stat().st_size for file in packed[0].glob("*.safetensors")) - header(packed[0])
    json.dumps([entry.to_dict() for entry in entries], allow_nan=False)


def header(directory: Path) -> int:
    (file,) = directory.glob("*.safetensors")
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_the_front_leaves_out_what_another_beats(entries: list[Entry]):
    assert list(pareto(entries)) == [entry.name for entry in entries[1:]]  # more bits, less KL
    beaten = Entry("beaten", 1, 8.5, entries[1].found)
    assert "beaten" not in pareto([*entries, beaten])
    assert list(pareto(entries[:1])) == []


def test_the_first_is_the_baseline_and_speed_is_measured(packed: list[Path], text: Path):
    first, second = compare_checkpoints(packed[:2], Source(text), SHORT)
    assert first.point is None
    assert second.point[1] > 0
    assert min(first.prompt_per_second, second.new_per_second) > 0


def test_table_and_plot(entries: list[Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    show_comparison(entries)
    assert "mean KL" in capsys.readouterr().out
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot(entries, tmp_path / "front.svg")
    assert (tmp_path / "front.svg").read_text().startswith("<?xml")
    with pytest.raises(RecipeError, match=r"--plot .*: cannot be written"):
        plot(entries, tmp_path / "front.unknown")


def test_one_alone_is_no_comparison(packed: list[Path], text: Path):
    with pytest.raises(RecipeError, match="at least two checkpoints"):
        compare_checkpoints(packed[:1], Source(text), SHORT)
