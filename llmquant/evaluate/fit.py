"""Whether models fit: windows into what they were made for, and they into memory."""

from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import CheckpointError, RecipeError
from llmquant.evaluate.perplexity import PIECE, Predictor, Whole
from llmquant.evaluate.protocol import Cut
from llmquant.memory import available
from llmquant.model.layout import decoder_layers
from llmquant.model.tokenizer import load_tokenizer
from llmquant.runtime.layered import Layered
from llmquant.runtime.loader import Filling, load

WIDENED = 8  # pieces of log-probabilities in fp64 that are alive together, at most
SPARE = 100_000_000  # bytes: what is read and converted, and what the allocator keeps


def open_models(
    directories: Sequence[Path],
    text: Cut,
    dtype: torch.dtype,
    max_memory: int | None = None,
    noticed: Callable[[float], None] = lambda part: None,
    device: str = "cpu",
) -> list[Predictor]:
    """Models to be asked together: whole if all of them fit into memory, else layer by layer.

    Args:
        max_memory: bytes that this process may have resident, or take of a GPU; what is left there if not given.
        noticed: told each part of the work that is done; the parts add up to 1.
        device: of torch, where the models compute.

    Raises:
        RecipeError: windows do not fit a model, or not even one layer fits into `max_memory`.
        CheckpointError: a directory cannot be opened, or its tokenizer gives ids that it does not know.
    """
    share = lambda part: noticed(part / len(directories))  # noqa: E731
    fillings = [Filling(Checkpoint.open(directory), dtype, device=device) for directory in directories]
    for directory, filling in zip(directories, fillings, strict=True):
        check_windows(directory, filling, text)
    left, taken = _memory(torch.device(device))
    limit = left if max_memory is None else max_memory - taken
    longest = max(len(window.ids) for window in text.windows)
    vocab = max(filling.model.config.get_text_config().vocab_size for filling in fillings)
    heads = 2 * len(fillings) * longest * vocab * dtype.itemsize + 8 * WIDENED * PIECE + SPARE  # a window and the next
    if heads + sum(filling.nbytes(filling.names) for filling in fillings) <= limit:
        return [Whole(load(directory, dtype, device=device), share) for directory in directories]
    states = sum(f.model.config.get_text_config().hidden_size for f in fillings) * longest * dtype.itemsize
    fixed = heads + sum(_outside(filling) for filling in fillings) + max(_largest(filling) for filling in fillings)
    at_once = (limit - fixed) // (2 * states)  # a layer makes new ones of the old, and keeps some between
    if at_once < 1:
        needed = fixed + 2 * states + taken
        raise RecipeError(
            f"--max-memory: one layer with one window needs about {needed / 1e9:.1f} GB; allow that, or lower --seq-len"
        )
    return [Layered(directory, dtype, at_once, share, device) for directory in directories]


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes that are left on a device, and that this process has taken there."""
    cuda = device.type == "cuda"
    return available(device), torch.cuda.memory_reserved(device) if cuda else psutil.Process().memory_info().rss


def _layers(filling: Filling) -> list[str]:
    return list(decoder_layers(filling.model, filling.model.config))


def _largest(filling: Filling) -> int:
    return max(filling.nbytes(filling.part(layer)) for layer in _layers(filling))


def _outside(filling: Filling) -> int:
    inside = tuple(f"{layer}." for layer in _layers(filling))
    return filling.nbytes(name for name in filling.names if not name.startswith(inside))


def check_tokenizers(directory: Path, tokenizer: PreTrainedTokenizerBase, baseline: Path, content: str) -> None:
    """Positions can be compared only where both models read the same tokens."""
    other = load_tokenizer(baseline)
    # Rules that the vocabulary does not show, how text is split and merged, differ within so many characters.
    own, others = (each(content[:100_000], verbose=False)["input_ids"] for each in (tokenizer, other))
    if tokenizer.get_vocab() != other.get_vocab() or own != others:
        raise CheckpointError(f"{directory}: its tokenizer is not that of {baseline}; compare with its own original")


def check_windows(directory: Path, filling: Filling, text: Cut) -> None:
    """Windows within the positions, and token ids within the embedding, that the model was made with."""
    limit = getattr(filling.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and text.protocol.seq_len > limit:
        raise RecipeError(
            f"--seq-len {text.protocol.seq_len}: {directory} was made for {limit} positions; use at most that"
        )
    rows = filling.model.get_input_embeddings().get_parameter("weight").shape[0]
    if (largest := max(int(window.ids.max()) for window in text.windows)) >= rows:
        raise CheckpointError(f"{directory}: its tokenizer gives id {largest}, its embedding has {rows} rows")
