import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmquant.calibration import sources
from llmquant.calibration.sources import Message, load_documents
from llmquant.errors import CalibrationError


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def refused(source: str, *, limit: int | None = None) -> str:
    """The message, which must be one line."""
    with pytest.raises(CalibrationError) as error:
        load_documents(source, limit=limit)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_each_kind_of_line(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "mix.jsonl",
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "hi", "weight": 1}], "src": "chats"},
        {"input_ids": [5, 6, 7]},
        {"input_ids": [5, 6, 7, 0], "attention_mask": [0, 1, 1, 0], "text": "ids win over text"},
    )
    text, chat, ids, masked = load_documents(file)
    assert (text.text, text.source) == ("plain", "mix.jsonl")
    assert (chat.messages, chat.source) == ((Message("user", "hi"),), "chats")
    assert ids.input_ids == (5, 6, 7)
    assert (masked.input_ids, masked.text) == ((6, 7), None)
    assert masked.where == f"{file}: line 4"


def test_limit_takes_the_first_lines_and_blank_ones_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "one"}\n  \n{"text": "two"}\n{"text": "three"}')
    assert [document.text for document in load_documents(str(path), limit=2)] == ["one", "two"]
    assert [document.where for document in load_documents(str(path))][-1].endswith("line 5")


def test_lines_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nbroken')
    assert len(load_documents(str(path), limit=1)) == 1
    assert "line 2" in refused(str(path))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("not json", "is not JSON"),
        ('{"text": "cut', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["a list"]', "is not a JSON object"),
        ('{"content": "x", "id": 3}', "has no text, messages or input_ids (found: content, id)"),
        ("{}", "found: nothing"),
        ('{"text": 7}', "has no text"),
        ('{"text": "x", "src": 3}', "src is not a string"),
        ('{"input_ids": "1 2 3"}', "input_ids is not a list of whole numbers"),
        ('{"input_ids": [1, 2.0]}', "input_ids is not a list of whole numbers"),
        ('{"input_ids": [1, true]}', "input_ids is not a list of whole numbers"),
        ('{"input_ids": [1, -1]}', "input_ids is not a list of whole numbers"),
        ('{"input_ids": [1, 2], "attention_mask": [1]}', "attention_mask is not a 0 or 1 for each of the 2"),
        ('{"input_ids": [1, 2], "attention_mask": [1, 2]}', "attention_mask is not a 0 or 1"),
        ('{"messages": []}', "messages is not a list with at least one"),
        ('{"messages": "hi"}', "messages is not a list"),
        ('{"messages": [{"role": "user"}]}', "a message is not"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "only text can be used"),
        ('{"messages": ["hi"]}', "a message is not"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    message = refused(str(path))
    assert message.startswith(f"{path}: line 2: ")
    assert says in message


def test_a_line_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    assert "line 2: is not UTF-8 at byte 13" in refused(str(path))


def test_a_line_over_the_limit_is_refused_without_reading_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 1_000_000)
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"text": "ok"}\n' + b"x" * 1_000_001)
    assert f"{path}: line 2: is longer than 1 MB" in refused(str(path))


def test_files_that_are_not_there_or_empty(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refused(str(tmp_path / "no.jsonl"))
    assert "cannot be read (No such file or directory)" in refused(str(tmp_path / "no.txt"))
    (tmp_path / "dir.txt").mkdir()
    assert "cannot be read (Is a directory)" in refused(str(tmp_path / "dir.txt"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "holds no documents" in refused(str(tmp_path / "empty.jsonl"))
    (tmp_path / "empty.txt").write_text(" \n")
    assert "is empty" in refused(str(tmp_path / "empty.txt"))


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("One paragraph.\n\nAnother, é.", encoding="utf-8")
    (document,) = load_documents(str(path))
    assert (document.text, document.source) == ("One paragraph.\n\nAnother, é.", "book.txt")


def test_a_text_file_that_is_not_utf8_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"first\nsecond\nthi\xffrd")
    assert f"{path}: line 3: is not UTF-8" in refused(str(path))
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 10)
    assert "is larger than" in refused(str(path))


@pytest.mark.parametrize("source", ["", "self", "wikitext", "notes.md", "a.json"])
def test_what_is_no_source(source: str) -> None:
    assert "is no source; use builtin" in refused(source)


def test_a_data_set_is_streamed(tmp_path: Path) -> None:
    """`datasets` reads a directory of data files as it reads a repository of the Hub, without a network."""
    jsonl(tmp_path / "train.jsonl", *({"text": f"row {i}"} for i in range(5)))
    jsonl(tmp_path / "test.jsonl", {"text": "held out"})
    found = load_documents(f"hf:{tmp_path}", limit=3)
    assert [document.text for document in found] == ["row 0", "row 1", "row 2"]
    assert found[0].source == f"hf:{tmp_path}"
    assert [document.text for document in load_documents(f"hf:{tmp_path}::test")] == ["held out"]
    assert "cannot be loaded" in refused(f"hf:{tmp_path}::validation")


def test_a_data_set_without_a_usable_column(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", {"question": "?", "answer": "!"})
    message = refused(f"hf:{tmp_path}")
    assert message.startswith(f"hf:{tmp_path}: row 1: has no text")
    assert "question, answer" in message


@pytest.mark.parametrize("source", ["hf:", "hf::config", "hf:name:config:split:more"])
def test_a_data_set_name_that_is_none(source: str) -> None:
    assert "is no data set name" in refused(source)


def test_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the datasets package; pip install 'llmquant[hub]'" in refused("hf:someone/something")


def test_offline_is_one_line() -> None:
    program = (
        "from llmquant.calibration.sources import load_documents\n"
        "from llmquant.errors import CalibrationError\n"
        "try:\n    load_documents('hf:someone/something')\n"
        "except CalibrationError as error:\n    print(error)\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=offline, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hf:someone/something: cannot be loaded (")
    assert done.stdout.count("\n") == 1
