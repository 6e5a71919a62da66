"""Tokens per second of whole models: reading a prompt, and writing after it."""

import ctypes
import statistics
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant.bench.timing import SHORT, seconds
from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import CheckpointError
from llmquant.kernels.cpu import PLANES
from llmquant.plan import check_original
from llmquant.runtime.loader import load

ROUNDS = 5


class Contestant(Protocol):
    """A model that is ready."""

    def read(self, ids: Tensor) -> None:
        """Compute what comes after a prompt [1, T]."""

    def write(self, ids: Tensor, count: int) -> None:
        """Read a prompt and choose `count` tokens after it, always the most likely one."""


class Result(NamedTuple):
    """Medians over rounds, in each of which every model had its turn."""

    name: str
    prompt_per_second: float
    new_per_second: float


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


class OfLlamaCpp:
    """A GGUF file in llama.cpp, by way of `llama-cpp-python`.

    Raises:
        CheckpointError: that is not installed, or cannot load the file.
    """

    def __init__(self, path: Path, room: int) -> None:
        threads = torch.get_num_threads()
        options = {"n_threads": threads, "n_threads_batch": threads, "n_batch": room, "n_ubatch": room}
        try:
            self._library: Any = import_module("llama_cpp")
            self._model = self._library.Llama(str(path), n_ctx=room, verbose=False, **options)
        except ImportError as error:
            raise CheckpointError(f"{path}: needs llama.cpp; pip install llama-cpp-python") from error
        except ValueError as error:  # whatever is wrong with the file
            raise CheckpointError(f"{path}: llama.cpp cannot load it; give a GGUF file") from error
        self._context = self._model._ctx.ctx

    def read(self, ids: Tensor) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._decode(ids.flatten().tolist())

    def write(self, ids: Tensor, count: int) -> None:
        self.read(ids)
        for _ in range(count - 1):
            self._decode([self._best()])
        self._best()

    def _decode(self, ids: list[int]) -> None:
        tokens = (self._library.llama_token * len(ids))(*ids)
        if self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama.cpp: cannot decode {len(ids)} tokens")

    def _best(self) -> int:
        row = ctypes.POINTER(ctypes.c_float * self._model.n_vocab())
        logits = ctypes.cast(self._library.llama_get_logits_ith(self._context, -1), row).contents
        return int(torch.frombuffer(logits, dtype=torch.float32).argmax())


def contestants(directory: Path, baseline: Path | None, gguf: list[Path], room: int) -> dict[str, Contestant]:
    """The packed checkpoint in each precision of activations; the original in bf16; GGUF files in llama.cpp.

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
        f"llmquant {precision}": OfTransformers(load(directory, precision=precision)) for precision in PLANES
    }
    if source:
        original = AutoModelForCausalLM.from_pretrained(source.root, dtype=torch.bfloat16).eval()
        found["transformers bf16"] = OfTransformers(original)
    return found | {f"llama.cpp {path.stem}": OfLlamaCpp(path, room) for path in gguf}


def measure(models: dict[str, Contestant], prompt_tokens: int, new_tokens: int, vocab_size: int) -> Iterator[Result]:
    """Every model, in turn."""
    ids = torch.randint(0, vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    reading: dict[str, list[float]] = {name: [] for name in models}
    writing: dict[str, list[float]] = {name: [] for name in models}
    short = ids[:, :SHORT]
    with torch.inference_mode():
        for _ in repeat(None, ROUNDS):
            for name, model in models.items():
                model.write(short, 2)  # wakes its threads
                reading[name].append(seconds(partial(model.read, ids)))
                writing[name].append(seconds(partial(model.write, short, new_tokens)))
    for name in models:
        read_in, written_in = statistics.median(reading[name]), statistics.median(writing[name])
        yield Result(name, prompt_tokens / read_in, new_tokens / written_in)
