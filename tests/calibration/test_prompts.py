"""The built-in set: whole, diverse, and fit for any tokenizer and chat template."""

import re
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest

from llmquant.calibration.sources import Document, load_documents

CATEGORIES = {"coding", "creative", "dialogue", "factual", "multilingual", "reasoning", "structured", "technical"}
SCRIPTS = ("CJK", "HIRAGANA", "HANGUL", "ARABIC", "DEVANAGARI", "CYRILLIC", "THAI", "GREEK", "HEBREW", "LATIN")


@pytest.fixture(scope="module")
def prompts() -> list[Document]:
    return load_documents("builtin")


def written(document: Document) -> str:
    return document.text or "\n\n".join(message.content for message in document.messages or ())


def test_every_category_has_its_share(prompts: list[Document]) -> None:
    counts = Counter(prompt.source for prompt in prompts)
    assert set(counts) == CATEGORIES
    assert min(counts.values()) >= 33
    assert counts.total() >= 264


def test_the_first_documents_are_a_mix(prompts: list[Document]) -> None:
    assert {prompt.source for prompt in prompts[:8]} == CATEGORIES
    assert {prompt.source for prompt in load_documents("builtin", limit=8)} == CATEGORIES


def test_conversations_alternate_and_most_are_answered(prompts: list[Document]) -> None:
    conversations = [prompt.messages for prompt in prompts if prompt.messages]
    for messages in conversations:
        # no system role and strict turns: some chat templates refuse anything else
        assert messages[0].role == "user"
        assert all({a.role, b.role} == {"user", "assistant"} for a, b in pairwise(messages))
    answered = sum(any(message.role == "assistant" for message in messages) for messages in conversations)
    assert answered >= len(conversations) / 2


def test_no_prompt_repeats_another(prompts: list[Document]) -> None:
    """Not as a whole, and not a run of eight words: nothing is a template with other nouns."""
    first_seen: dict[tuple[str, ...], str] = {}
    for prompt in prompts:
        words = re.findall(r"\w+", written(prompt).lower())
        for i in range(len(words) - 7):
            assert first_seen.setdefault(tuple(words[i : i + 8]), prompt.where) == prompt.where


def test_no_addresses_but_example_com(prompts: list[Document]) -> None:
    for prompt in prompts:
        for host in re.findall(r"(?:https?://|[\w.]@)([\w-]+(?:\.[\w-]+)+)", written(prompt)):
            assert host.endswith("example.com"), prompt.where


def test_text_is_clean_unicode(prompts: list[Document]) -> None:
    for prompt in prompts:
        text = written(prompt)
        assert unicodedata.is_normalized("NFC", text), prompt.where
        assert text == text.strip("\n"), prompt.where
        assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn") and c not in "\n\t"], (
            prompt.where
        )
        assert 60 <= len(text) <= 4000, prompt.where


def test_many_scripts(prompts: list[Document]) -> None:
    letters = {c for prompt in prompts if prompt.source == "multilingual" for c in written(prompt) if c.isalpha()}
    found = {unicodedata.name(c).split()[0] for c in letters}
    assert found >= set(SCRIPTS)
