"""`llmquant eval`: a finished directory on a text, alone or beside the checkpoint that it was made from."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llmquant.errors import CheckpointError, RecipeError
from llmquant.evaluate.divergence import Divergence, compare
from llmquant.evaluate.perplexity import Perplexity, Protocol, perplexity, windows
from llmquant.runtime.loader import load


@dataclass(frozen=True)
class Text:
    """What is read to the model, under the name that the protocol gives it."""

    name: str
    content: str

    def __str__(self) -> str:
        return f"{self.name} (sha256 {hashlib.sha256(self.content.encode()).hexdigest()[:12]})"


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


def read_text(text_file: Path | None, dataset: str | None) -> Text:
    """Exactly one of the two sources."""
    if text_file is not None and dataset is None:
        try:
            return Text(text_file.name, text_file.read_bytes().decode("utf-8"))
        except OSError as error:
            raise RecipeError(f"--text-file {text_file}: cannot be read: {error.strerror}; check the path") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"--text-file {text_file}: byte {error.start} is not UTF-8; convert the file") from error
    if dataset is not None and text_file is None:
        return read_dataset(dataset)
    raise RecipeError("--text-file, --dataset: give one of the two to measure on")


def read_dataset(dataset: str) -> Text:
    """The `text` column of NAME[:CONFIG[:SPLIT]], rows joined by blank lines; the split is `test` if not named."""
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(f"--dataset {dataset}: needs the datasets package; pip install 'llmquant[hub]'") from error
    name, config, split, *rest = [*dataset.split(":"), "", ""]
    if not name or any(rest):
        raise RecipeError(f"--dataset {dataset}: is no data set name; write NAME[:CONFIG[:SPLIT]]")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "test")
    except Exception as error:  # datasets, its file systems and its HTTP client share no base class
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RecipeError(f"--dataset {dataset}: cannot be loaded ({cause}); check name and connection") from error
    if "text" not in rows.column_names:
        raise RecipeError(f"--dataset {dataset}: has no column text, only {rows.column_names}; use --text-file")
    return Text(f"{dataset}, rows joined by blank lines", "\n\n".join(rows["text"]))


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give a checkpoint on this disk")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # a broken file gives anything from OSError to KeyError to a bare Exception
        cause = str(error).partition("\n")[0]
        raise CheckpointError(f"{directory}: its tokenizer cannot be loaded ({cause}); restore its files") from error


def check_tokenizers(directory: Path, tokenizer: PreTrainedTokenizerBase, baseline: Path, content: str) -> None:
    """Positions can be compared only where both models read the same tokens."""
    other = load_tokenizer(baseline)
    start = content[:100_000]  # enough to see rules differ that the vocabulary does not show
    if tokenizer.get_vocab() != other.get_vocab() or tokenizer.encode(start) != other.encode(start):
        raise CheckpointError(f"{directory}: its tokenizer is not that of {baseline}; compare with its own original")


def check_fit(directory: Path, model: PreTrainedModel, ids: Tensor) -> None:
    """Windows within the positions, and token ids within the embedding, that the model was made with."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and ids.shape[1] > limit:
        raise RecipeError(f"--seq-len {ids.shape[1]}: {directory} was made for {limit} positions; use at most that")
    rows = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= rows:
        raise CheckpointError(f"{directory}: its tokenizer gives id {int(ids.max())}, its embedding has {rows} rows")
