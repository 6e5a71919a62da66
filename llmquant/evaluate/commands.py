"""`llmquant eval`: what the command line asks of this package."""

from enum import Enum
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from llmquant.display import print_json, progress, results, show_table
from llmquant.evaluate.text import NAMED
from llmquant.options import Device, parse_percent, parse_size, resolve_device

if TYPE_CHECKING:
    from llmquant.evaluate.run import Evaluation
    from llmquant.evaluate.tasks import Choice


class ProtocolName(str, Enum):
    windows = "windows"
    sliding = "sliding"
    llama_cpp = "llama.cpp"
    word = "word"


TextFile = Annotated[Path | None, typer.Option(help="UTF-8 text to measure on.")]
DatasetName = Annotated[str | None, typer.Option(help=f"{', '.join(NAMED)}, or PATH[:CONFIG[:SPLIT]] of the Hub.")]
ProtocolOption = Annotated[ProtocolName, typer.Option(help="How the text is cut and counted; see docs/evaluation.md.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens of each window. (default: 2048; llama.cpp 512)")]
Stride = Annotated[int | None, typer.Option(help="Of sliding windows. (default: a quarter of a window)")]
MaxWindows = Annotated[int | None, typer.Option(help="Stop after so many windows.")]
MaxMemory = Annotated[
    str | None, typer.Option(help="As in 4GB; models that do not fit pass layer by layer. (default: what is free)")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    text_file: TextFile = None,
    dataset: DatasetName = None,
    protocol: ProtocolOption = ProtocolName.windows,
    seq_len: SeqLen = None,
    stride: Stride = None,
    max_windows: MaxWindows = None,
    baseline: Annotated[Path | None, typer.Option(help="The original checkpoint, for KL and agreement.")] = None,
    max_increase: Annotated[str | None, typer.Option(help="Gate: perplexity over the baseline's, as in 5%.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Gate: mean KL divergence in nats, as in 0.05.")] = None,
    junit_file: Annotated[Path | None, typer.Option("--junit", help="Write the gates as JUnit XML.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Of lm-eval, as in arc_easy,piqa, instead of a text.")] = None,
    task_path: Annotated[Path | None, typer.Option(help="A directory with more tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first samples of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each sample.")] = None,
    max_memory: MaxMemory = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure perplexity; against a baseline also KL divergence and agreement. Exit code 3: a gate does not hold."""
    from llmquant.checkpoint.durable import write_file
    from llmquant.evaluate.gate import gates, junit, require
    from llmquant.evaluate.protocol import Request
    from llmquant.evaluate.run import evaluate as run_evaluation
    from llmquant.evaluate.tasks import Choice

    bound, where = parse_percent(max_increase), resolve_device(device)
    if tasks is not None:
        if bound is not None or max_kl is not None or text_file or dataset:
            raise typer.BadParameter("--tasks is measured by itself; texts and gates go with another call")
        choice = Choice(tuple(tasks.split(",")), task_path, limit, num_fewshot)
        ask(directory, baseline, choice, where, as_json=as_json)
        return
    if (bound is not None or max_kl is not None) and baseline is None:
        raise typer.BadParameter("--max-increase and --max-kl compare with --baseline DIR; give it, too")
    started = perf_counter()
    with progress("eval") as noticed:
        result = run_evaluation(
            directory,
            text_file=text_file,
            dataset=dataset,
            request=Request(protocol.value, seq_len, stride, max_windows),
            baseline=baseline,
            max_memory=parse_size(max_memory),
            noticed=noticed,
            device=where,
        )
    asked = gates(result, bound, max_kl)
    if junit_file is not None:
        write_file(junit_file, [junit(result, asked, perf_counter() - started)])
    if as_json:
        gated = {gate.option: {"measured": gate.measured, "bound": gate.bound, "held": gate.held} for gate in asked}
        print_json(result.to_dict() | {"gates": gated})
    else:
        show_table(readable(result))
    require(asked)


def ask(directory: Path, baseline: Path | None, choice: "Choice", device: str, *, as_json: bool) -> None:
    """Tasks of lm-eval, and beside them those of the original."""
    from llmquant.evaluate.tasks import run_tasks, side_by_side

    found = [run_tasks(each, choice, device=device) for each in (directory, baseline) if each is not None]
    if as_json:
        beside = {"baseline": found[1].to_dict()} if baseline else {}
        print_json(found[0].to_dict() | beside)
        return
    table = Table("task", "metric", *(scores.directory for scores in found), caption=found[0].protocol)
    for row in side_by_side(found):
        table.add_row(*row)
    results.print(table)


def readable(result: "Evaluation") -> dict[str, Any]:
    """Each figure with its interval beside it."""
    facts = result.to_dict()
    for name, (low, high) in facts.pop("intervals").items():
        facts[name] = f"{facts[name]:.5g}   ({low:.5g} to {high:.5g})"
    return {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in facts.items()}
