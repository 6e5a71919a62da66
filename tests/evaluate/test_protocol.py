"""Each protocol's windows: by hand, by rule, and beside the tool that it is named after."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmquant.errors import RecipeError
from llmquant.evaluate.perplexity import Whole, perplexity
from llmquant.evaluate.protocol import Cut, Request, cut
from llmquant.runtime.loader import load

TEXT = "Quantization maps real weights to small integers. " * 12


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path):
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


class Letters:
    """A tokenizer that gives each character its code, behind a BOS if asked to."""

    bos_token_id = 1
    eos_token_id = 2

    def __init__(self, bos: bool = False) -> None:
        self._bos = [1] if bos else []

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        return {"input_ids": (self._bos if add_special_tokens else []) + [ord(letter) for letter in text]}


def read(text: str, *, bos: bool = False, documents: tuple[str, ...] = (), **request: object) -> Cut:
    return cut(Letters(bos), "t", documents or (text,), "", Request(**request), "float32")


def shown(found: Cut) -> list[tuple[str, int]]:
    return [("".join(map(chr, w.ids.tolist())).replace("\x01", "^"), w.predicted) for w in found.windows]


def test_windows_do_not_overlap_and_drop_the_rest():
    assert shown(read("abcdefgh", seq_len=3)) == [("abc", 2), ("def", 2)]
    assert shown(read("abcdefgh", seq_len=3, max_windows=1)) == [("abc", 2)]
    assert shown(read("ab", seq_len=3)) == [("ab", 1)]


def test_sliding_windows_predict_what_is_new():
    assert shown(read("abcdefgh", kind="sliding", seq_len=4, stride=2)) == [("abcd", 3), ("cdef", 2), ("efgh", 2)]
    assert shown(read("abcdefg", kind="sliding", seq_len=4, stride=3)) == [("abcd", 3), ("defg", 3)]


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_sliding_windows_predict_every_token_once(length: int, seq_len: int, data: st.DataObject):
    stride = data.draw(st.integers(1, seq_len - 1))
    found = read("".join(map(chr, range(100, 100 + length))), kind="sliding", seq_len=seq_len, stride=stride)
    predicted = itertools.chain.from_iterable(w.ids[-w.predicted :].tolist() for w in found.windows)
    assert list(predicted) == list(range(101, 100 + length))
    assert found.protocol.tokens == length - 1


def test_llama_cpp_predicts_second_halves_and_begins_each_window():
    assert shown(read("abcdefghi", kind="llama.cpp", seq_len=4)) == [("abcd", 1), ("efgh", 1)]
    assert shown(read("abcdefg", bos=True, kind="llama.cpp", seq_len=4)) == [("^abc", 1), ("^efg", 1)]
    protocol = read("a" * 1100, kind="llama.cpp").protocol
    assert (protocol.seq_len, protocol.windows, protocol.tokens) == (512, 2, 2 * 255)


def test_words_are_of_whole_documents_behind_a_begin():
    found = read("", documents=("ab cd", "e"), kind="word", seq_len=3)
    assert shown(found) == [("^ab ", 3), ("b cd", 2), ("^e", 1)]
    assert (found.protocol.words, found.protocol.tokens) == (3, 6)


def test_word_perplexity_is_that_of_lm_eval(tiny_checkpoint: Path, tmp_path: Path):
    """Documents shorter and longer than a window, through lm-eval's own rolling windows and its own metric."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    documents = ("One short page.", TEXT, TEXT[:333] + " \n tail")
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps({"page": d}) + "\n" for d in documents))
    (tmp_path / "pages.yaml").write_text(
        f"""task: pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "pages.jsonl"}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
    )
    model = load(tiny_checkpoint, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    host = HFLM(pretrained=model, tokenizer=tokenizer, max_length=32, batch_size=1)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(host, tasks=["pages"], task_manager=manager, bootstrap_iters=0)
    theirs = found["results"]["pages"]["word_perplexity,none"]
    text = cut(tokenizer, "t", documents, "", Request("word", seq_len=32), "float32")
    assert perplexity(Whole(model), text).value == pytest.approx(theirs, rel=1e-4)


def test_windows_are_the_text_tokenized_once_without_remainder(tokenizer):
    all_ids = tokenizer(TEXT)["input_ids"]
    found = cut(tokenizer, "t", (TEXT,), "", Request(seq_len=32), "float32")
    ids = torch.stack([window.ids for window in found.windows])
    assert ids.shape == (len(all_ids) // 32, 32)
    assert len(all_ids) % 32
    assert ids.flatten().tolist() == all_ids[: ids.numel()]


@pytest.mark.parametrize(
    ("text", "request_", "message"),
    [
        ("", {}, "has 0 tokens"),
        ("", {"kind": "word"}, "no token to predict"),
        (TEXT, {"seq_len": 1}, "--seq-len 1"),
        (TEXT, {"seq_len": 32, "max_windows": 0}, "--max-windows 0"),
        (TEXT, {"stride": 8}, "--stride 8: belongs to --protocol sliding"),
        (TEXT, {"kind": "sliding", "seq_len": 8, "stride": 8}, "below its --seq-len"),
        (TEXT, {"kind": "word", "max_windows": 2}, "whole documents"),
        (TEXT, {"kind": "other"}, "choose one of windows, sliding, llama.cpp, word"),
    ],
)
def test_nothing_to_predict_and_contradictions_are_errors(text, request_, message):
    with pytest.raises((RecipeError, KeyError), match=message):
        read(text, **request_)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"seq_len": 4}, "t, tokenized whole without BOS, 2 windows of 4 without overlap, 6 predicted tokens, float32"),
        (
            {"kind": "sliding", "seq_len": 4, "stride": 2},
            "t, tokenized whole without BOS, 3 windows of 4 at strides of 2, each token predicted once, "
            "7 predicted tokens, float32",
        ),
        (
            {"kind": "llama.cpp", "seq_len": 4},
            "t, tokenized whole without BOS, 2 windows of 4 without overlap, second halves predicted, "
            "2 predicted tokens, float32",
        ),
        (
            {"kind": "word", "seq_len": 16},
            "t, documents behind BOS, 1 windows of 8, per word of 1, 8 predicted tokens, float32",
        ),
    ],
)
def test_protocol_is_one_line(request_, words):
    assert str(read("abcdefgh", **request_).protocol) == words
