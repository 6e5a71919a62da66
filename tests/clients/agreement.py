"""How far a client agrees with our runtime: the figures of docs/compatibility.md.

The client continues 32 prompts greedily, as its users run it. Our runtime then reads each prompt with the continuation,
in fp32, and says what it would have chosen at every place. Where all 16 choices of a text are the same, so is the text.
"""

import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from llmquant.calibration.sources import load_documents
from llmquant.runtime.loader import load

TEXTS, PROMPT, NEW = 32, 16, 16  # prompts, tokens of each, tokens that the client adds
TIED = 0.5  # of a logit: what bf16 activations leave, in 30 layers


@dataclass(frozen=True)
class Agreement:
    """Of `NEW` tokens after each of `TEXTS` prompts.

    Attributes:
        same: places where our runtime chooses the client's token.
        texts: prompts where it does so at every place.
        margin: by how much our runtime prefers its own choice, in logits, at worst, where it chooses otherwise.
        difference: largest between the two log probabilities of the client's token; None if it does not tell.
    """

    same: int
    texts: int
    margin: float
    difference: float | None

    def cells(self) -> str:
        told = "" if self.difference is None else f"{self.difference:.2f}"
        return f"{self.texts} of {TEXTS} | {self.same} of {TEXTS * NEW} | {self.margin:.2f} | {told}"


@dataclass
class Table:
    """The rows that a run of client tests has measured."""

    rows: list[str] = field(default_factory=list)

    def add(self, layout: str, client: str, packages: dict[str, str], found: Agreement) -> None:
        """`packages` are versions by name."""
        versions = ", ".join(f"{name} {number}" for name, number in packages.items())
        self.rows.append(f"| {layout} | {client} | {versions} | {found.cells()} |")


def installed(*packages: str) -> dict[str, str]:
    """Versions by name; nothing of what is not there."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    return f"{platform.machine()}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def prompts(directory: Path) -> Tensor:
    """[TEXTS, PROMPT]: how the first built-in calibration prompts that are long enough begin."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [document.messages[0].content for document in load_documents("builtin") if document.messages]
    ids = [row for row in tokenizer(texts, add_special_tokens=False)["input_ids"] if len(row) >= PROMPT]
    return torch.tensor([row[:PROMPT] for row in ids[:TEXTS]])


@torch.inference_mode()
def compare(directory: Path, ids: Tensor, chosen: Tensor, logprobs: Tensor | None = None) -> Agreement:
    """`chosen` [TEXTS, NEW]: what the client adds to `ids`, with the log probability that it gives to each."""
    logits = load(directory, torch.float32)(torch.cat((ids, chosen), 1)).logits.float()[:, PROMPT - 1 : -1]
    best = logits.max(-1)
    same = best.indices == chosen
    own = logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    difference = None
    if logprobs is not None:
        difference = float((own - logits.logsumexp(-1) - logprobs).abs().max())
    return Agreement(int(same.sum()), int(same.all(-1).sum()), float((best.values - own).max()), difference)


@torch.inference_mode()
def compare_model(directory: Path, client: PreTrainedModel, ids: Tensor) -> Agreement:
    """The same of a transformers model."""
    client.generation_config.eos_token_id = None  # every text has the same length
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    whole = client.generate(ids, **asked)
    logits = client(whole).logits.float()[:, PROMPT - 1 : -1]
    chosen = whole[:, PROMPT:]
    return compare(directory, ids, chosen, logits.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1))
