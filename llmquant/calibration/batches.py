"""Documents -> token batches, with every real token counted and every padded one marked.

Text is shuffled, joined and cut into full sequences; rows of token ids are used as they are. The models are causal, so
padding stands on the right, where no real token can see it: a batch needs no attention mask, only `mask`, which keeps
the padded positions out of every Hessian.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmquant.calibration.sources import Document
from llmquant.errors import CalibrationError

MIN_TOKENS = 8  # a shorter sequence says more about the attention sink of the first token than about language


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass, padded on the right to the longest of them."""

    input_ids: Tensor  # int64 [B, T], 0 where padded
    mask: Tensor  # bool [B, T], False where padded


@dataclass(frozen=True)
class Calibration:
    """What the model will be shown, and what the report says about it."""

    batches: tuple[Batch, ...]
    tokens: dict[str, int]  # real tokens by source
    sequences: int
    digest: str  # sha256 over the real tokens of each sequence, in order; the batch size has no part in it
    notes: tuple[str, ...]  # what was dropped or done differently, one sentence each


@dataclass
class Tokens:
    """A stretch of token ids, and how many of them each source gave."""

    ids: list[int] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)

    def extend(self, ids: list[int], source: str) -> None:
        self.ids += ids
        self.sources[source] += len(ids)

    def __len__(self) -> int:
        return len(self.ids)


def build(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seq_len: int,
    vocab_size: int,
    seed: int,
    pack: bool = True,
    batch_size: int = 1,
) -> Calibration:
    """At most `samples` sequences of at most `seq_len` tokens; fewer documents give fewer sequences.

    Rows of `input_ids` come first, one sequence each, in their order. Conversations and text fill the remaining room:
    shuffled by `seed`, then (`pack`) joined and cut into sequences of exactly `seq_len` tokens, of which a random
    choice is used; without `pack` each document is one sequence. `vocab_size` is the number of embedding rows.

    Raises CalibrationError if an id is outside the vocabulary, if the chat template refuses a conversation, or if not
    one sequence of 8 tokens is left.
    """
    if samples < 1 or seq_len < MIN_TOKENS:
        raise CalibrationError(
            f"calibration: {samples} samples of {seq_len} tokens; ask for at least 1 sample of {MIN_TOKENS}"
        )
    rng = Random(seed)  # noqa: S311  (a reproducible shuffle, not a secret)
    notes: list[str] = []
    rows = [document for document in documents if document.input_ids is not None]
    texts = _distinct([document for document in documents if document.input_ids is None], notes)
    rng.shuffle(texts)

    if repeats := len(rows) - len({row.input_ids for row in rows}):
        notes.append(f"{repeats} rows of ids are exact repeats of others: used, as given")
    sequences = _each([_ids(row, tokenizer, vocab_size) for row in rows], rows, seq_len, notes)[:samples]
    encoded = [_ids(text, tokenizer, vocab_size) for text in texts]
    cut = _joined(encoded, texts, seq_len, _bos(tokenizer)) if pack else _each(encoded, texts, seq_len, notes)
    sequences += _choose(cut, samples - len(sequences), rng)
    if not sequences:
        raise CalibrationError(
            f"calibration: {len(documents)} documents give no sequence of {MIN_TOKENS} tokens; add text to the source"
        )
    return Calibration(
        batches=_batches(sequences, batch_size),
        tokens=dict(sorted(sum((s.sources for s in sequences), Counter[str]()).items())),
        sequences=len(sequences),
        digest=_digest(sequences),
        notes=(*notes, *_tokenizer_notes(texts, tokenizer, vocab_size)),
    )


def encode(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The document's token ids.

    A conversation goes through the tokenizer's chat template, which writes its own special tokens. Text, and a
    conversation where there is no template, gets the special tokens that the tokenizer adds by itself.
    """
    if document.input_ids is not None:
        return list(document.input_ids)
    messages = document.messages or ()
    if not _templated(document, tokenizer):
        plain = document.text or "\n\n".join(message.content for message in messages)
        return tokenizer(plain, verbose=False).input_ids
    try:
        conversation = tokenizer.apply_chat_template([message._asdict() for message in messages], tokenize=False)
        return tokenizer(conversation, add_special_tokens=False, verbose=False).input_ids
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise CalibrationError(
            f"{document.where}: the model's chat template refuses this conversation ({error}); change its roles"
        ) from error


def _distinct(documents: list[Document], notes: list[str]) -> list[Document]:
    """Text and conversations without the blank ones and without repeats."""
    unique = list({(d.text, d.messages): d for d in reversed(documents)}.values())[::-1]
    written = [d for d in unique if d.messages or (d.text or "").strip()]
    if repeats := len(documents) - len(unique):
        notes.append(f"{repeats} documents dropped: exact repeats of others")
    if blank := len(unique) - len(written):
        notes.append(f"{blank} documents dropped: blank")
    return written


def _ids(document: Document, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """The document's ids, each inside the vocabulary; plain text ends in EOS where the tokenizer has one."""
    ids = encode(document, tokenizer)
    if document.input_ids is None and not _templated(document, tokenizer):
        eos = tokenizer.eos_token_id
        ids += [eos] if eos is not None and ids[-1:] != [eos] else []
    if ids and max(ids) >= vocab_size:
        raise CalibrationError(
            f"{document.where}: token id {max(ids)} is outside the model's vocabulary of {vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    return ids


def _templated(document: Document, tokenizer: PreTrainedTokenizerBase) -> bool:
    return document.messages is not None and tokenizer.chat_template is not None


def _bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that the tokenizer puts before every text, if it does."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos] else None


def _joined(encoded: list[list[int]], documents: list[Document], seq_len: int, bos: int | None) -> list[Tokens]:
    """The documents end to end, cut into full sequences; the rest counts if it is a quarter of one, or all there is.

    Where the tokenizer adds BOS, every sequence starts with it: such models are trained to find it at position 0.
    """
    sequences: list[Tokens] = []
    for ids, document in zip(encoded, documents, strict=True):
        start = 0
        while start < len(ids):
            if not sequences or len(sequences[-1]) == seq_len:
                sequences.append(Tokens())
                if bos is not None and ids[start] != bos:
                    sequences[-1].extend([bos], document.source)
            piece = ids[start : start + seq_len - len(sequences[-1])]
            sequences[-1].extend(piece, document.source)
            start += len(piece)
    enough = max(MIN_TOKENS, seq_len // 4 if len(sequences) > 1 else 0)
    return [sequence for sequence in sequences if len(sequence) >= enough]


def _each(encoded: list[list[int]], documents: list[Document], seq_len: int, notes: list[str]) -> list[Tokens]:
    """One sequence for each document, without those that are too short to mean anything."""
    sequences = [
        Tokens(ids[:seq_len], Counter({document.source: min(len(ids), seq_len)}))
        for ids, document in zip(encoded, documents, strict=True)
    ]
    kept = [sequence for sequence in sequences if len(sequence) >= MIN_TOKENS]
    if short := len(sequences) - len(kept):
        notes.append(f"{short} documents dropped: shorter than {MIN_TOKENS} tokens")
    return kept


def _choose(sequences: list[Tokens], room: int, rng: Random) -> list[Tokens]:
    """`room` of the sequences at random, in their order: a long text is sampled all over, not at its beginning."""
    if len(sequences) <= room:
        return sequences
    return [sequences[i] for i in sorted(rng.sample(range(len(sequences)), room))]


def _tokenizer_notes(texts: list[Document], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[str]:
    if not texts:
        return []
    conversations = sum(text.messages is not None for text in texts)
    notes = [f"the tokenizer puts {'no' if _bos(tokenizer) is None else 'a'} BOS token before text"]
    if conversations and tokenizer.chat_template is None:
        notes.append(f"{conversations} conversations joined as plain text: the tokenizer has no chat template")
    if len(tokenizer) != vocab_size:
        # often padding of the embedding; also one or two added tokens that text cannot hold, so no error by itself
        notes.append(f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {vocab_size} rows")
    return notes


def _batches(sequences: list[Tokens], batch_size: int) -> tuple[Batch, ...]:
    """Longest first, so that sequences of like length share a batch and little is padded."""
    ordered = sorted(sequences, key=len, reverse=True)
    return tuple(_pad(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size))


def _pad(sequences: list[Tokens]) -> Batch:
    shape = len(sequences), len(sequences[0])  # [B, T]
    batch = Batch(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool))
    for row, sequence in enumerate(sequences):
        batch.input_ids[row, : len(sequence)] = torch.tensor(sequence.ids)
        batch.mask[row, : len(sequence)] = True
    return batch


def _digest(sequences: list[Tokens]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(f"{sequence.ids}\n".encode())
    return digest.hexdigest()
