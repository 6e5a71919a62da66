"""`llmquant eval`: a finished directory on a text, alone or beside the checkpoint that it was made from."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmquant.errors import CheckpointError, RecipeError
from llmquant.evaluate.divergence import Divergence, compare
from llmquant.evaluate.perplexity import Perplexity, Protocol, perplexity, windows
from llmquant.evaluate.text import read_text
from llmquant.model.tokenizer import load_tokenizer
from llmquant.runtime.loader import load


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one `llmquant eval`, with their protocol."""

    directory: str
    perplexity: Perplexity
    baseline: Perplexity | None = None
    divergence: Divergence | None = None

    def to_dict(self) -> dict[str, Any]:
        """Flat: directory, perplexity, protocol; with a baseline also its perplexity and the divergence from it."""
        facts: dict[str, Any] = {"directory": self.directory, "perplexity": self.perplexity.value}
        if self.baseline and self.divergence:
            facts |= {"baseline_perplexity": self.baseline.value, **asdict(self.divergence)}
        return facts | {"protocol": str(self.perplexity.protocol)}


def evaluate(
    directory: Path,
    *,
    text_file: Path | None = None,
    dataset: str | None = None,
    seq_len: int = 2048,
    max_windows: int | None = None,
    baseline: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """Perplexity of `directory` on a text file or a data set; with `baseline` also KL and top-1 agreement.

    Raises:
        CheckpointError: a directory cannot be loaded, or the two do not share a tokenizer.
        RecipeError: no text, an unreadable one, or windows that do not fit the model.
        NumericsError: a model gave NaN or Inf.
    """
    text = read_text(text_file, dataset)
    tokenizer = load_tokenizer(directory)
    ids = windows(tokenizer, text.content, seq_len, max_windows)
    if baseline is not None:
        check_tokenizers(directory, tokenizer, baseline, text.content)
    model = load(directory, dtype)
    check_fit(directory, model, ids)
    bos = tokenizer.bos_token_id is not None and int(ids[0, 0]) == tokenizer.bos_token_id
    protocol = Protocol(str(text), ids.shape[1], len(ids), ids[:, 1:].numel(), bos, str(dtype).removeprefix("torch."))
    if baseline is None:
        return Evaluation(str(directory), perplexity(model, ids, protocol))
    reference = load(baseline, dtype)
    check_fit(baseline, reference, ids)
    both = compare(model, reference, ids, protocol)
    return Evaluation(str(directory), both.model, both.baseline, both.divergence)


def check_tokenizers(directory: Path, tokenizer: PreTrainedTokenizerBase, baseline: Path, content: str) -> None:
    """Positions can be compared only where both models read the same tokens."""
    other = load_tokenizer(baseline)
    # Rules that the vocabulary does not show, how text is split and merged, differ within so many characters.
    own, others = (each(content[:100_000], verbose=False)["input_ids"] for each in (tokenizer, other))
    if tokenizer.get_vocab() != other.get_vocab() or own != others:
        raise CheckpointError(f"{directory}: its tokenizer is not that of {baseline}; compare with its own original")


def check_fit(directory: Path, model: PreTrainedModel, ids: Tensor) -> None:
    """Windows within the positions, and token ids within the embedding, that the model was made with."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and ids.shape[1] > limit:
        raise RecipeError(f"--seq-len {ids.shape[1]}: {directory} was made for {limit} positions; use at most that")
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    if int(ids.max()) >= rows:
        raise CheckpointError(f"{directory}: its tokenizer gives id {int(ids.max())}, its embedding has {rows} rows")
