"""How a text becomes windows of tokens, of which some are predicted: what gives a perplexity its meaning.

Tools differ in the length of windows, in how text is joined, in which tokens of a window count and in where a token
that begins a text goes. Four protocols are here, each as its tool has it:

windows     the GPTQ paper's (arXiv 2210.17323, section 4): the text tokenized whole, windows that do not overlap, the
            remainder dropped; all tokens of a window are predicted but its first
sliding     Hugging Face's: windows that overlap, each of which predicts what no window before it did
llama.cpp   its `llama-perplexity`: windows of 512 that do not overlap, of which the second half is predicted
word        lm-eval's `word_perplexity`: each document behind a token that begins it; the nats of all tokens over words
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmquant.errors import RecipeError

Kind = Literal["windows", "sliding", "llama.cpp", "word"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SEQ_LEN: dict[Kind, int] = {"windows": 2048, "sliding": 2048, "llama.cpp": 512, "word": 2048}


class Window(NamedTuple):
    """Token ids [T], of which the last `predicted` are; a model reads all but the last."""

    ids: Tensor
    predicted: int

    @property
    def read(self) -> Tensor:
        return self.ids[:-1]


@dataclass(frozen=True)
class Protocol:
    """How a number was measured; numbers compare only where all of it is equal."""

    text: str  # name and the first 12 digits of the sha256
    seq_len: int  # tokens of a window
    windows: int
    tokens: int  # that are predicted
    bos: bool  # the text begins with a token that says so
    dtype: str  # of the computation
    kind: Kind = "windows"
    stride: int | None = None  # of "sliding": tokens from one window to the next
    words: int | None = None  # of "word": what the nats are divided by

    @property
    def unit(self) -> int:
        """What perplexity is per: predicted tokens, or words."""
        return self.words or self.tokens

    def __str__(self) -> str:
        bos = "with" if self.bos else "without"
        whole = f"tokenized whole {bos} BOS, {self.windows} windows of {self.seq_len}"
        rule = {
            "windows": f"{whole} without overlap",
            "sliding": f"{whole} at strides of {self.stride}, each token predicted once",
            "llama.cpp": f"{whole} without overlap, {'each with BOS, ' if self.bos else ''}second halves predicted",
            "word": f"documents behind {'BOS' if self.bos else 'EOS'}, {self.windows} windows of {self.seq_len}, "
            f"per word of {self.words}",
        }
        return f"{self.text}, {rule[self.kind]}, {self.tokens} predicted tokens, {self.dtype}"


@dataclass(frozen=True)
class Request:
    """Which protocol, and its lengths; those not given are the protocol's own."""

    kind: Kind = "windows"
    seq_len: int | None = None
    stride: int | None = None  # of "sliding"; a quarter of a window if not given
    max_windows: int | None = None

    @property
    def length(self) -> int:
        return self.seq_len or SEQ_LEN[self.kind]

    @property
    def step(self) -> int:
        return self.stride or max(1, self.length // 4)

    def check(self) -> None:
        """Raise RecipeError where the options contradict each other."""
        if self.kind not in KINDS:
            raise RecipeError(f"--protocol {self.kind}: is none; choose one of {', '.join(KINDS)}")
        if self.length < 2 or (self.max_windows is not None and self.max_windows < 1):
            raise RecipeError(
                f"--seq-len {self.length}, --max-windows {self.max_windows}: need at least 2 tokens and 1 window"
            )
        if self.stride is not None and (self.kind != "sliding" or not 0 < self.stride < self.length):
            raise RecipeError(f"--stride {self.stride}: belongs to --protocol sliding, and is below its --seq-len")
        if self.max_windows is not None and self.kind == "word":
            raise RecipeError("--max-windows: --protocol word counts the words of whole documents; shorten the text")


class Cut(NamedTuple):
    """A text as a protocol reads it."""

    windows: list[Window]
    protocol: Protocol


def cut(
    tokenizer: PreTrainedTokenizerBase, name: str, documents: Sequence[str], joined: str, request: Request, dtype: str
) -> Cut:
    """The windows of a text, which is `documents` with `joined` between them, and their protocol.

    Raises:
        RecipeError: the options contradict each other, or there is nothing to predict.
    """
    request.check()
    bos, length = tokenizer.bos_token_id, request.length
    if request.kind == "word":
        begin = bos if bos is not None else tokenizer.eos_token_id
        if begin is None:
            raise RecipeError("--protocol word: the tokenizer has neither BOS nor EOS to begin a document with")
        each = (tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] for document in documents)
        found = [window for ids in each for window in _rolling(torch.tensor([begin, *ids]), length)]
        begins, words = bos is not None, sum(len(re.split(r"\s+", document)) for document in documents)
    else:
        ids = torch.tensor(tokenizer(joined.join(documents), verbose=False)["input_ids"], dtype=torch.long)
        begins, words = bos is not None and ids[:1].tolist() == [bos], None
        if len(ids) < 2:
            raise RecipeError(f"{name}: has {len(ids)} tokens, perplexity needs at least 2; give a longer text")
        found = list(_cut(ids, request, begins))[: request.max_windows]
    tokens = sum(window.predicted for window in found)
    if not tokens:
        raise RecipeError(f"{name}: has no token to predict, perplexity needs at least 2; give a longer text")
    widest = max(len(window.read if words else window.ids) for window in found)
    stride = request.step if request.kind == "sliding" else None
    return Cut(found, Protocol(name, widest, len(found), tokens, begins, dtype, request.kind, stride, words))


def _cut(ids: Tensor, request: Request, bos: bool) -> Iterator[Window]:
    """A text shorter than one window is one shorter window."""
    length = min(request.length, len(ids))
    if request.kind == "sliding":
        yield from _sliding(ids, length, request.step)
        return
    for window in ids[: len(ids) // length * length].view(-1, length):
        if request.kind == "llama.cpp":
            if bos:  # in the place of the window's own first token
                window = torch.cat([ids[:1], window[1:]])
            yield Window(window, length - 1 - length // 2)
        else:
            yield Window(window, length - 1)


def _sliding(ids: Tensor, length: int, stride: int) -> Iterator[Window]:
    """Windows at multiples of `stride`; the last one ends with the text."""
    done = 1  # the first token has nothing before it
    for start in range(0, len(ids), stride):
        end = min(start + length, len(ids))
        yield Window(ids[start:end], end - done)
        done = end
        if end == len(ids):
            return


def _rolling(ids: Tensor, length: int) -> Iterator[Window]:
    """`ids`, of which the first begins the document, in windows that read `length` tokens and predict the next.

    Windows predict disjoint tokens; the last one reaches back, so that it reads as many as the others.
    """
    for start in range(1, len(ids), length):
        end = min(start + length, len(ids))
        yield Window(ids[max(0, end - length - 1) : end], end - start)
