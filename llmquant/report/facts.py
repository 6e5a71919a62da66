"""What a finished directory tells of its run: read from its log, its recipe and the figures beside it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
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
    kind: str  # its name inside of the layer; of an expert, without its number
    bits: int
    scheme: str
    method: str = ""
    error: float | None = None  # relative, at its output
    outliers: float | None = None  # of its inputs: the largest channel over the median one
    seconds: float = 0.0
    tokens: int | None = None  # of the calibration text that an expert received; None for other linears


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
    def rows(self) -> list[Linear]:
        """The linears, but all experts of a layer as one for each kind: mean error, largest outliers, time together."""
        together: dict[tuple[int, str], list[Linear]] = {}
        for linear in self.linears:
            together.setdefault((linear.layer, linear.kind), []).append(linear)
        return [_as_one(linears) for linears in together.values()]

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
    experts = {name for layer in layout.layers for name in layer.experts}
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
                    kind=_kind(name.removeprefix(f"{layer.name}."), expert=name in experts),
                    bits=scheme.bits if scheme else KEPT,
                    scheme=str(scheme or "kept"),
                    method=record.get("method", ""),
                    error=record.get("error"),
                    outliers=record.get("outliers"),
                    seconds=record.get("seconds", 0.0),
                    tokens=record.get("tokens") if name in experts else None,
                )
            )
    return found


def _kind(name: str, *, expert: bool) -> str:
    block, _, linear = name.rpartition(".")
    return f"{block.rpartition('.')[0]}.{linear}" if expert else name


def _as_one(linears: list[Linear]) -> Linear:
    first, errors = linears[0], [linear.error for linear in linears if linear.error is not None]
    if len(linears) == 1:
        return first
    methods = dict.fromkeys(linear.method for linear in linears)
    return replace(
        first,
        name=f"{first.name.rsplit('.', 2)[0]}.*.{first.name.rpartition('.')[2]}",
        method=", ".join(method for method in methods if method),
        error=mean(errors) if errors else None,
        outliers=max((linear.outliers for linear in linears if linear.outliers is not None), default=None),
        seconds=sum(linear.seconds for linear in linears),
    )
