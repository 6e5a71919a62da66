"""`llmquant eval`: a finished directory on a text, alone or beside the checkpoint that it was made from."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmquant.evaluate.bootstrap import METHOD, Interval, intervals
from llmquant.evaluate.divergence import Comparison, Divergence, compare
from llmquant.evaluate.fit import check_tokenizers, open_models
from llmquant.evaluate.perplexity import Perplexity, perplexity
from llmquant.evaluate.protocol import Cut, Request, cut
from llmquant.evaluate.text import Source, Text
from llmquant.memory import return_large_blocks
from llmquant.model.tokenizer import load_tokenizer

WINDOWS = Request()


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one `llmquant eval`, with their protocol."""

    directory: str
    perplexity: Perplexity
    baseline: Perplexity | None = None
    divergence: Divergence | None = None
    intervals: dict[str, Interval] = field(default_factory=dict)

    @property
    def increase(self) -> float | None:
        """Of the perplexity over the baseline's, a fraction."""
        return None if self.baseline is None else self.perplexity.value / self.baseline.value - 1

    def to_dict(self) -> dict[str, Any]:
        """Flat but for the intervals; with a baseline also its perplexity and the divergence from it."""
        facts: dict[str, Any] = {"directory": self.directory, "perplexity": self.perplexity.value}
        if self.baseline and self.divergence:
            facts |= {"baseline_perplexity": self.baseline.value, "increase": self.increase}
            facts |= asdict(self.divergence)
        ends = {name: list(interval) for name, interval in self.intervals.items()}
        how = {"interval": METHOD} if ends else {}
        return facts | how | {"intervals": ends, "protocol": str(self.perplexity.protocol)}


def evaluate(
    directory: Path,
    *,
    text_file: Path | None = None,
    dataset: str | None = None,
    request: Request = WINDOWS,
    baseline: Path | None = None,
    dtype: torch.dtype = torch.float32,
    max_memory: int | None = None,
    noticed: Callable[[float], None] = lambda part: None,
    device: str = "cpu",
) -> Evaluation:
    """Perplexity of `directory` on a text file or a data set; with `baseline` also KL, agreement and overlap.

    Models that do not fit into the memory of `device`, or into `max_memory` bytes of it, pass the windows layer by
    layer; the numbers are the same. `noticed` is told each part of the work that is done; the parts add up to 1.

    Raises:
        CheckpointError: a directory cannot be loaded, or the two do not share a tokenizer.
        RecipeError: no text, an unreadable one, or windows that do not fit the model.
        NumericsError: a model gave NaN or Inf.
    """
    return_large_blocks()
    text = Source(text_file, dataset).read()
    windows = cut_for(directory, text, request, dtype)
    if baseline is None:
        (model,) = open_models([directory], windows, dtype, max_memory, noticed, device)
        return alone(directory, perplexity(model, windows))
    check_tokenizers(directory, load_tokenizer(directory), baseline, text.content)
    model, reference = open_models([directory, baseline], windows, dtype, max_memory, noticed, device)
    return beside(directory, compare(model, reference, windows))


def cut_for(directory: Path, text: Text, request: Request, dtype: torch.dtype) -> Cut:
    """The text as the tokenizer of `directory` cuts it."""
    name = str(dtype).removeprefix("torch.")
    return cut(load_tokenizer(directory), str(text), text.documents, text.joined, request, name)


def alone(directory: Path, found: Perplexity) -> Evaluation:
    per_unit = found.protocol.tokens / found.protocol.unit
    ends = intervals(found.nll[None], {"perplexity": lambda mean: (mean[0] * per_unit).exp()})
    return Evaluation(str(directory), found, intervals=ends)


def beside(directory: Path, both: Comparison) -> Evaluation:
    protocol = both.model.protocol
    per_unit = protocol.tokens / protocol.unit
    figures = torch.stack([both.model.nll, both.baseline.nll, both.kl.double(), both.same.double()])
    ends = intervals(
        figures,
        {
            "perplexity": lambda mean: (mean[0] * per_unit).exp(),
            "baseline_perplexity": lambda mean: (mean[1] * per_unit).exp(),
            "increase": lambda mean: ((mean[0] - mean[1]) * per_unit).exp() - 1,
            "mean_kl": lambda mean: mean[2],
            "top1_agreement": lambda mean: mean[3],
        },
    )
    return Evaluation(str(directory), both.model, both.baseline, both.divergence, ends)
