"""`evaluate` on directories: texts, tokenizers and windows that fit, and those that do not."""

import hashlib
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from llmquant.errors import CheckpointError, RecipeError
from llmquant.evaluate.protocol import Request
from llmquant.evaluate.run import evaluate
from llmquant.evaluate.text import NAMED, read_rows

TEXT = "Every window is predicted on its own; nothing carries over. " * 20
SHORT = Request(seq_len=32, max_windows=2)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def test_perplexity_with_its_protocol(tiny_checkpoint, text_file):
    facts = evaluate(tiny_checkpoint, text_file=text_file, request=SHORT).to_dict()
    digest = hashlib.sha256(TEXT.encode()).hexdigest()[:12]
    assert facts == {
        "directory": str(tiny_checkpoint),
        "perplexity": facts["perplexity"],
        "intervals": {},  # too few tokens
        "protocol": f"text.txt (sha256 {digest}), tokenized whole without BOS, 2 windows of 32 without overlap, "
        "62 predicted tokens, float32",
    }
    assert 100 < facts["perplexity"] < 5000  # random weights: near the 512 tokens of the vocabulary
    json.dumps(facts, allow_nan=False)


def test_line_ends_do_not_change_the_text(tiny_checkpoint, tmp_path):
    results = []
    for name, end in (("unix", "\n"), ("windows", "\r\n"), ("old-mac", "\r")):
        path = tmp_path / name
        path.write_bytes(TEXT.replace(". ", "." + end).encode())
        results.append(evaluate(tiny_checkpoint, text_file=path, request=SHORT).perplexity.nll.tolist())
    assert results[0] == results[1] == results[2]


def test_against_itself_nothing_diverges(tiny_checkpoint, text_file):
    facts = evaluate(tiny_checkpoint, text_file=text_file, request=SHORT, baseline=tiny_checkpoint).to_dict()
    assert facts["perplexity"] == facts["baseline_perplexity"]
    assert (facts["mean_kl"], facts["max_kl"], facts["top1_agreement"], facts["positions"]) == (0, 0, 1, 62)


def test_another_model_diverges(tiny_checkpoint, make_checkpoint, text_file):
    other = make_checkpoint(seed=1)
    facts = evaluate(tiny_checkpoint, text_file=text_file, request=SHORT, baseline=other).to_dict()
    assert facts["mean_kl"] > 0.1
    assert facts["baseline_perplexity"] == pytest.approx(
        evaluate(other, text_file=text_file, request=SHORT).to_dict()["perplexity"]
    )


def test_local_dataset_is_joined_by_blank_lines(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [TEXT, "", TEXT.upper()]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    joined = tmp_path / "joined.txt"
    joined.write_bytes("\n\n".join(rows).encode())
    by_name = evaluate(tiny_checkpoint, dataset=f"{tmp_path / 'data'}::test", request=Request(seq_len=64))
    by_file = evaluate(tiny_checkpoint, text_file=joined, request=Request(seq_len=64))
    assert torch.equal(by_name.perplexity.nll, by_file.perplexity.nll)
    assert "rows joined by blank lines" in by_name.perplexity.protocol.text


def test_named_data_sets_say_column_rows_and_what_joins_them(tmp_path, monkeypatch):
    """The ways in which wikitext2, c4 and ptb are read, on rows of our own."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    rows = [{"sentence": f"row {i}"} for i in range(5)]
    (tmp_path / "data" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = replace(NAMED["ptb"], path=str(tmp_path / "data"), config=None, options={}, rows=3)
    text = read_rows("ptb", wanted)
    assert (text.content, text.name) == ("row 0 row 1 row 2", "ptb, rows joined by spaces")
    assert {name: source.joined for name, source in NAMED.items()} == {"wikitext2": "\n\n", "c4": " ", "ptb": " "}


def test_layer_by_layer_the_numbers_are_the_same(tiny_checkpoint, make_checkpoint, text_file):
    """A limit between what one layer and what both models take, and one below which nothing goes."""
    large = {"layers": 8, "hidden": 256, "intermediate": 4096, "vocab": 512}
    models = make_checkpoint(**large), make_checkpoint(seed=1, **large)
    measure = partial(evaluate, models[0], text_file=text_file, request=SHORT, baseline=models[1])
    parts: list[float] = []
    free, used = measure(noticed=parts.append), psutil.Process().memory_info().rss
    needed = 100_000_000 + 8 * 8 * 2**20  # what is kept free, and pieces of log-probabilities
    bound = measure(max_memory=used + needed + 80_000_000)
    assert free.to_dict() == bound.to_dict()
    assert sum(parts) == pytest.approx(1)
    with pytest.raises(RecipeError, match="--max-memory: one layer with one window needs about"):
        measure(max_memory=used // 2)


def test_dataset_without_text_is_refused(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    with pytest.raises(RecipeError, match="no column of strings named text"):
        evaluate(tiny_checkpoint, dataset=str(tmp_path / "data"))


def test_other_tokenizer_is_refused(tiny_checkpoint, make_checkpoint, text_file):
    with pytest.raises(CheckpointError, match="tokenizer is not that of"):
        evaluate(tiny_checkpoint, text_file=text_file, request=Request(seq_len=32), baseline=make_checkpoint(vocab=400))


def test_same_vocabulary_cut_by_other_rules_is_refused(tiny_checkpoint, text_file, tmp_path):
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    rules = json.loads((other / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:50]
    (other / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(CheckpointError, match="tokenizer is not that of"):
        evaluate(tiny_checkpoint, text_file=text_file, request=Request(seq_len=32), baseline=other)


def test_windows_longer_than_the_model_are_refused(tiny_checkpoint, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 20)
    with pytest.raises(RecipeError, match=r"--seq-len 4096: .* 2048 positions"):
        evaluate(tiny_checkpoint, text_file=path, request=Request(seq_len=4096))


def test_ids_beyond_the_embedding_are_refused(tiny_checkpoint, make_checkpoint, text_file, tmp_path):
    small = shutil.copytree(make_checkpoint(vocab=400), tmp_path / "small")
    shutil.copy(tiny_checkpoint / "tokenizer.json", small / "tokenizer.json")
    with pytest.raises(CheckpointError, match="embedding has 400 rows"):
        evaluate(small, text_file=text_file, request=Request(seq_len=32))


def test_no_text_and_two_texts_are_refused(tiny_checkpoint, text_file):
    with pytest.raises(RecipeError, match="give one of the two"):
        evaluate(tiny_checkpoint)
    with pytest.raises(RecipeError, match="give one of the two"):
        evaluate(tiny_checkpoint, text_file=text_file, dataset="x")


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), (b"ab\xff", "byte 2 is not UTF-8")])
def test_unreadable_text_is_one_line(tiny_checkpoint, tmp_path, content, message):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        evaluate(tiny_checkpoint, text_file=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [("a:b:c:d", "PATH"), ("", "PATH"), ("{here}", "cannot be loaded")])
def test_bad_dataset_is_one_line(tiny_checkpoint, tmp_path, name, message):
    with pytest.raises(RecipeError, match=message) as caught:
        evaluate(tiny_checkpoint, dataset=name.format(here=tmp_path))
    assert "\n" not in str(caught.value)


def test_directory_without_a_tokenizer(tiny_checkpoint, text_file, tmp_path):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        evaluate(tmp_path, text_file=text_file)
    with pytest.raises(CheckpointError, match="no such directory"):
        evaluate(tmp_path / "nowhere", text_file=text_file)
