"""Text while it is made."""

from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmquant.server.reader import Reader

TEXT = "naïve : 日本語 🤖 text, and then some more of it"


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


def read(tokenizer: PreTrainedTokenizerBase, text: str, *stops: str) -> tuple[list[str], bool]:
    """The parts until the end or a stop string."""
    reader, parts = Reader(tokenizer.backend_tokenizer, stops), []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        parts.append(reader.read(token))
        if reader.stopped:
            break
    return [*parts, reader.rest()], reader.stopped


def test_parts_are_whole_characters_and_together_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    parts, stopped = read(tokenizer, TEXT)
    assert "".join(parts) == TEXT
    assert not stopped
    assert "" in parts  # some characters are several tokens
    assert "\ufffd" not in "".join(parts)


@pytest.mark.parametrize(
    ("stop", "kept"), [("🤖", "naïve : 日本語 "), (" more", "naïve : 日本語 🤖 text, and then some"), ("n", "")]
)
def test_the_text_ends_before_a_stop_string(tokenizer: PreTrainedTokenizerBase, stop: str, kept: str) -> None:
    assert read(tokenizer, TEXT, stop) != read(tokenizer, TEXT)
    parts, stopped = read(tokenizer, TEXT, "never there", stop)
    assert ("".join(parts), stopped) == (kept, True)


def test_the_first_stop_string_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    assert "".join(read(tokenizer, TEXT, "some", "then")[0]) == "naïve : 日本語 🤖 text, and "


def test_what_may_begin_a_stop_string_waits_and_comes_if_it_does_not(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "aXYbXYZc"
    for stop in ("XYQ", "XYZ!", "cc"):
        parts, stopped = read(tokenizer, text, stop)
        assert ("".join(parts), stopped) == (text, False)
    parts, stopped = read(tokenizer, text, "XYZ")
    assert ("".join(parts), stopped) == ("aXYb", True)
    assert not any(part.endswith(("X", "XY")) for part in parts)
