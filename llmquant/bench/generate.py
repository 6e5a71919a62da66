"""Tokens per second of whole models: reading a prompt, and writing after it, for one sequence or several at once."""

import ctypes
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import finalize

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant.bench.timing import SHORT, seconds
from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import CheckpointError
from llmquant.kernels.cpu import PLANES
from llmquant.plan import check_original
from llmquant.runtime.decode import CACHE, next_logits
from llmquant.runtime.loader import load

ROUNDS = 5


class Contestant(Protocol):
    """A model that is ready."""

    def read(self, ids: Tensor) -> None:
        """Compute what comes after a prompt [1, T]."""

    def write(self, ids: Tensor, count: int) -> None:
        """Read prompts [sequences, T] and choose `count` tokens after each, always the most likely one."""


class Result(NamedTuple):
    """Medians over rounds, in each of which every model had its turn."""

    name: str
    sequences: int  # that are written at once; prompts are read one by one
    prompt_per_second: float
    new_per_second: float  # of all sequences


class OfTransformers:
    """A transformers model, packed or not."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def read(self, ids: Tensor) -> None:
        out = self._model(input_ids=ids.to(self._model.device), use_cache=True, logits_to_keep=1)
        float(out.logits[0, -1, 0])  # a GPU has come so far when it can be read

    def write(self, ids: Tensor, count: int) -> None:
        told = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        ids = ids.to(self._model.device)
        self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **told).tolist()


class OfLlmquant(OfTransformers):
    """A packed checkpoint as `llmquant serve` runs it: each sequence has a cache of its own."""

    def write(self, ids: Tensor, count: int) -> None:
        if len(ids) == 1 or not self._write_together(ids, count):
            super().write(ids, count)

    def _write_together(self, ids: Tensor, count: int) -> bool:
        """Whether the native steps serve this model."""
        told = {"use_cache": True, "logits_to_keep": 1}
        read = [self._model(input_ids=prompt.view(1, -1).to(self._model.device), **told) for prompt in ids]
        caches = [out[CACHE] for out in read]
        best = [int(out.logits[0, -1].argmax()) for out in read]
        for _ in range(count - 1):
            logits = next_logits(self._model, best, caches)
            if logits is None:
                return False
            best = logits.argmax(1).tolist()
        return True


class OfLlamaCpp:
    """A GGUF file in llama.cpp, by way of `llama-cpp-python`.

    Raises:
        CheckpointError: that is not installed, or cannot load the file.
    """

    def __init__(self, path: Path, room: int, sequences: int) -> None:
        """For so many `sequences` at once, each of which has `room` tokens."""
        threads = torch.get_num_threads()
        try:
            library: Any = import_module("llama_cpp")
            self._model: Any = library.Llama(str(path), n_ctx=room, verbose=False)
        except ImportError as error:
            raise CheckpointError(f"{path}: needs llama.cpp; pip install llama-cpp-python") from error
        except ValueError as error:  # whatever is wrong with the file
            raise CheckpointError(f"{path}: llama.cpp cannot load it; give a GGUF file") from error
        options = library.llama_context_default_params()
        options.n_ctx, options.n_seq_max = room * sequences, sequences
        options.n_batch = options.n_ubatch = room * sequences
        options.n_threads = options.n_threads_batch = threads
        self._library = library
        self._context = library.llama_init_from_model(self._model.model, options)
        if not self._context:
            raise CheckpointError(f"{path}: llama.cpp has no memory for {sequences} sequences of {room} tokens")
        finalize(self, library.llama_free, self._context)
        self._batch = library.llama_batch_init(room * sequences, 0, 1)
        finalize(self, library.llama_batch_free, self._batch)

    def read(self, ids: Tensor) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._decode(ids, 0)

    def write(self, ids: Tensor, count: int) -> None:
        self.read(ids)
        for made in range(count - 1):
            self._decode(self._best(len(ids)), ids.shape[1] + made)
        self._best(len(ids))

    def _decode(self, ids: Tensor, before: int) -> None:
        """More tokens [sequences, T] of all sequences, which have `before` of them."""
        batch, (sequences, length) = self._batch, ids.shape
        batch.n_tokens = ids.numel()
        # The last token of each sequence, whose logits are wanted, comes behind all others: they are then in a row.
        order = [(sequence, i) for i in range(length) for sequence in range(sequences)]
        for place, (sequence, i) in enumerate(order):
            batch.token[place], batch.pos[place] = int(ids[sequence, i]), before + i
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = i == length - 1
        if self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp: cannot decode {ids.numel()} tokens")

    def _best(self, sequences: int) -> Tensor:
        """The most likely next token [sequences, 1] of each."""
        row = ctypes.POINTER(ctypes.c_float * (sequences * self._model.n_vocab()))
        logits = ctypes.cast(self._library.llama_get_logits(self._context), row).contents
        return torch.frombuffer(logits, dtype=torch.float32).view(sequences, -1).argmax(1, keepdim=True)


def contestants(
    directory: Path, baseline: Path | None, gguf: list[Path], room: int, sequences: int = 1
) -> dict[str, Contestant]:
    """The packed checkpoint in each precision of activations; the original in bf16; GGUF files in llama.cpp.

    They are for at most so many sequences of `room` tokens.

    Raises:
        CheckpointError: a directory or file is not there or cannot be loaded, the checkpoint is not quantized, or the
            original is.
    """
    if not Checkpoint.open(directory).config.get("quantization_config"):
        raise CheckpointError(f"{directory}: is not quantized; give it as --baseline, beside what was made of it")
    source = Checkpoint.open(baseline) if baseline else None
    if source:
        check_original(source)
    found: dict[str, Contestant] = {
        f"llmquant {precision}": OfLlmquant(load(directory, precision=precision)) for precision in PLANES
    }
    if source:
        original = AutoModelForCausalLM.from_pretrained(source.root, dtype=torch.bfloat16).eval()
        found["transformers bf16"] = OfTransformers(original)
    return found | {f"llama.cpp {path.stem}": OfLlamaCpp(path, room, sequences) for path in gguf}


def measure(
    models: dict[str, Contestant],
    prompt_tokens: int,
    new_tokens: int,
    vocab_size: int,
    sequences: Sequence[int] = (1,),
) -> Iterator[Result]:
    """Every model, in turn, with each number of sequences."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (max(sequences), max(prompt_tokens, SHORT)), generator=generator)
    reading: dict[str, list[float]] = {name: [] for name in models}
    writing: dict[tuple[str, int], list[float]] = {(name, count): [] for name in models for count in sequences}
    short = ids[:, :SHORT]
    with torch.inference_mode():
        for _ in repeat(None, ROUNDS):
            for name, model in models.items():
                model.write(short[:1], 2)  # wakes its threads
                reading[name].append(seconds(partial(model.read, ids[:1, :prompt_tokens])))
                for count in sequences:
                    writing[name, count].append(seconds(partial(model.write, short[:count], new_tokens)))
    for (name, count), written in writing.items():
        read_in, written_in = statistics.median(reading[name]), statistics.median(written)
        yield Result(name, count, prompt_tokens / read_in, count * new_tokens / written_in)
