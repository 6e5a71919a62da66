"""What a finished directory tells of its run: read from its log, its recipe and the figures beside it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmquant.card import EVALUATION
from llmquant.checkpoint.reader import Checkpoint
from llmquant.checkpoint.strict_json import parse_object
from llmquant.errors import VerifyError
from llmquant.formats import for_config
from llmquant.inspect import inspect_checkpoint
from llmquant.manifest import LOG, MANIFEST, RECIPE, is_sealed
from llmquant.model.layout import derive_layout
from llmquant.model.shell import read_config

KEPT = 16  # bits of a linear that is not quantized


@dataclass(frozen=True)
class Linear:
    """One linear of a decoder layer. Figures are None where the log has none."""

    name: str
    layer: int
    kind: str  # its name inside of the layer
    bits: int
    scheme: str
    method: str = ""
    error: float | None = None  # relative, at its output
    outliers: float | None = None  # of its inputs: the largest channel over the median one
    seconds: float = 0.0


@dataclass(frozen=True)
class Facts:
    """All that the page shows."""

    directory: str
    summary: dict[str, Any]  # of `llmquant inspect`
    head: dict[str, Any]  # the first line of the log
    linears: tuple[Linear, ...]
    recipe: str
    evaluation: dict[str, Any]  # of `llmquant eval --json`; empty where there is none
    manifest: str

    @property
    def layers(self) -> list[int]:
        return sorted({linear.layer for linear in self.linears})

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(linear.kind for linear in self.linears))


def read_facts(directory: Path, evaluation: Path | None = None) -> Facts:
    """Everything about a directory that `llmquant quantize` finished; figures from `evaluation` or from beside it.

    Raises:
        VerifyError: the log is missing or not as it was written.
        LlmquantError: the checkpoint or the figures cannot be read.
    """
    log = directory / LOG
    if not log.is_file() or not is_sealed(log.read_bytes()):
        raise VerifyError(f"{log}: is missing or damaged; a report is made of what `llmquant quantize` finished")
    head, *lines = [json.loads(line) for line in log.read_bytes().splitlines()[:-1]]
    beside = directory / EVALUATION
    figures = evaluation or (beside if beside.is_file() else None)
    return Facts(
        directory=directory.resolve().name,
        summary=inspect_checkpoint(directory),
        head=head,
        linears=tuple(_linears(directory, {line["module"]: line for line in lines if "module" in line})),
        recipe=(directory / RECIPE).read_text(encoding="utf-8") if (directory / RECIPE).is_file() else "",
        evaluation=parse_object(figures.read_bytes(), figures) if figures else {},
        manifest=(directory / MANIFEST).read_text(encoding="utf-8"),
    )


def _linears(directory: Path, records: dict[str, dict[str, Any]]) -> list[Linear]:
    source = Checkpoint.open(directory)
    layout = derive_layout(read_config(source))
    block = source.config["quantization_config"]
    schemes = for_config(block).read_config(block, list(layout.shapes))
    found = []
    for number, layer in enumerate(layout.layers):
        for name in (name for group in layer.groups for name in group.linears):
            scheme, record = schemes.get(name), records.get(name, {})
            found.append(
                Linear(
                    name=name,
                    layer=number,
                    kind=name.removeprefix(f"{layer.name}."),
                    bits=scheme.bits if scheme else KEPT,
                    scheme=str(scheme or "kept"),
                    method=record.get("method", ""),
                    error=record.get("error"),
                    outliers=record.get("outliers"),
                    seconds=record.get("seconds", 0.0),
                )
            )
    return found
