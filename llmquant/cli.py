"""The command line: one thin command per API call.

Exit codes: 0 done; 1 failed on its input or the machine (one line on stderr); 2 bad usage; 3 a quality
gate did not hold; 128 + n stopped by signal n. With --json, stdout holds one JSON object and nothing else.
"""

import signal
import sys
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmquant.bench.commands import app as bench_app
from llmquant.display import Display, console, print_json, progress, results, show_plan, show_table
from llmquant.errors import LlmquantError
from llmquant.evaluate.commands import (
    DatasetName,
    Json,
    MaxMemory,
    MaxWindows,
    ProtocolName,
    ProtocolOption,
    SeqLen,
    Stride,
    TextFile,
    evaluate,
)  # fmt: skip
from llmquant.evaluate.text import Source
from llmquant.hub.commands import push as push_command
from llmquant.options import (
    Device,
    Precision,
    PrecisionName,
    merged_recipe,
    parse_percent,
    parse_ranks,
    parse_size,
    resolve_device,
    target_of,
)
from llmquant.report.commands import report
from llmquant.server.commands import serve

if TYPE_CHECKING:
    from llmquant import search
    from llmquant.pipeline import Options
    from llmquant.recipe import Recipe

app = typer.Typer(
    help="INT4 quantization of Hugging Face LLM checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(bench_app, name="bench")
app.command(name="eval")(evaluate)
app.command(name="push")(push_command)
app.command(name="report")(report)
app.command(name="serve")(serve)

Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]


TargetBits = Annotated[float | None, typer.Option(help="Mixed precision: bits per weight to keep to, as in 4.5.")]
TargetSize = Annotated[str | None, typer.Option(help="Mixed precision: a size of the checkpoint, as in 4.8GB.")]
TargetKl = Annotated[float | None, typer.Option(help="Mixed precision: a KL divergence not to exceed, predicted.")]
MixedChoices = Annotated[str | None, typer.Option(help="Bits that it chooses from. (default: 4,8,16; 16 keeps)")]


class Method(str, Enum):
    rtn = "rtn"
    awq = "awq"
    gptq = "gptq"
    awq_gptq = "awq+gptq"
    auto = "auto"


class Preset(str, Enum):
    fast = "fast"
    default = "default"
    best = "best"


class Format(str, Enum):
    compressed_tensors = "compressed-tensors"
    gptq = "gptq"
    awq = "awq"


class Target(str, Enum):
    compressed_tensors = "compressed-tensors"
    gptq = "gptq"
    gptq_v2 = "gptq_v2"
    awq = "awq"
    gguf = "gguf"
    onnx = "onnx"
    modelopt = "modelopt"


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A checkpoint directory or a Hub name.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The directory to write.")],
    method: Annotated[Method | None, typer.Option(help="How codes are chosen. (default: auto)")] = None,
    preset: Annotated[Preset | None, typer.Option(help="Time against accuracy. (default: default)")] = None,
    bits: Annotated[int | None, typer.Option(help="3, 4 or 8. (default: 4)")] = None,
    group_size: Annotated[int | None, typer.Option(help="32, 64, 128, or -1 for per-channel. (default: 128)")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Zero point fixed or free. (default: --sym)")] = None,
    format: Annotated[Format | None, typer.Option(help="Packed layout. (default: compressed-tensors)")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="builtin, self, FILE.jsonl, FILE.txt or hf:NAME. (default: builtin)")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences. (default: 128)")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in each of them. (default: 512)")] = None,
    tensor_parallel: Annotated[str | None, typer.Option(help="Ranks to check for, as in 1,2,4,8.")] = None,
    target_bits: TargetBits = None,
    target_size: TargetSize = None,
    target_kl: TargetKl = None,
    choices: MixedChoices = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML file; options given here override it.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random. (default: 0)")] = None,
    device: Device = "auto",
    max_memory: Annotated[str | None, typer.Option(help="Refuse a run that needs more, as in 16GB.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Drop an unfinished run and start anew.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished checkpoint in OUT.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    max_increase: Annotated[str | None, typer.Option(help="Try until perplexity rises by no more, as in 5%.")] = None,
    text_file: TextFile = None,
    dataset: DatasetName = None,
    max_windows: MaxWindows = None,
    max_bits_per_weight: Annotated[float | None, typer.Option(help="Budget of such a search.")] = None,
    max_size: Annotated[str | None, typer.Option(help="The same, of all weight files, as in 5GB.")] = None,
    push: Annotated[str | None, typer.Option(help="ORG/NAME: push it there, shards as they finish; private.")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint. The same command again continues a run that was stopped."""
    from llmquant.pipeline import Options, preview

    wanted = merged_recipe(
        recipe,
        {
            "preset": preset and preset.value,
            "method": method and method.value,
            "format": format and format.value,
            "seed": seed,
            "tensor_parallel": parse_ranks(tensor_parallel),
            "scheme": {"bits": bits, "group_size": group_size, "symmetric": sym},
            "calibration": {"source": calibration, "samples": samples, "seq_len": seq_len},
            "target": target_of(target_bits, target_size, target_kl, choices),
        },
    )
    options = Options(
        device=resolve_device(device),
        max_memory=parse_size(max_memory),
        resume=not no_resume,
        overwrite=overwrite,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if dry_run:
        with Display() as display:
            plan = preview(model, wanted, options, display)
        print_json(plan.to_dict()) if as_json else show_plan(plan, results)
        return
    if max_increase is not None:
        if push:
            raise typer.BadParameter("--push goes with a run, not with a search; push what it finds")
        from llmquant import search

        source, bound = Source(text_file, dataset), parse_percent(max_increase) or 0.0
        limits = max_bits_per_weight, parse_size(max_size, "--max-size")
        run_search(model, out, wanted, options, search.Target(bound, source, max_windows, *limits), as_json=as_json)
        return
    run(model, out, wanted, options, push, as_json=as_json)


@app.command()
def convert(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A quantized checkpoint, of any tool.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The directory to write.")],
    to: Annotated[Target, typer.Option(help="The layout to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished checkpoint in OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Write a quantized checkpoint in another layout, with the same integers; refuse where it cannot hold them."""
    from llmquant.convert import convert as run_conversion

    made = run_conversion(directory, out, to.value, overwrite=overwrite)
    if as_json:
        print_json(made.to_dict())
        return
    for note in made.notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"[bold]{out}[/bold] is complete and verified: {made.linears} linears, {made.source} -> {made.to}")


@app.command()
def sensitivity(
    model: Annotated[str, typer.Argument(metavar="DIR", help="An original checkpoint, or a Hub name.")],
    recipe: Annotated[Path | None, typer.Option(help="A YAML file; its overrides stay as they are.")] = None,
    group_size: Annotated[int | None, typer.Option(help="32, 64, 128, or -1 for per-channel. (default: 128)")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Zero point fixed or free. (default: --sym)")] = None,
    calibration: Annotated[str | None, typer.Option(help="As in quantize; 32 sequences are enough.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences, at most 32 of them are used.")] = 32,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in each of them. (default: 512)")] = None,
    target_bits: TargetBits = None,
    target_size: TargetSize = None,
    target_kl: TargetKl = None,
    choices: MixedChoices = None,
    true_kl: Annotated[bool, typer.Option("--true-kl", help="Measure each layer by itself, too.")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the recommended recipe here.")] = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show which linears hurt, and recommend mixed precision for a target."""
    from llmquant.pipeline import Options, sense
    from llmquant.sensitivity.tables import show_sensitivity

    target = target_of(target_bits, target_size, target_kl, choices)
    if (out or choices) and not any(target[key] for key in ("bits", "size", "kl")):
        raise typer.BadParameter("a recipe needs a target; give --target-bits, --target-size or --target-kl")
    given = {
        "scheme": {"group_size": group_size, "symmetric": sym},
        "calibration": {"source": calibration, "samples": samples, "seq_len": seq_len},
        "target": target,
    }
    options = Options(device=resolve_device(device), trust_remote_code=trust_remote_code)
    with Display() as display:
        found, mixture = sense(model, merged_recipe(recipe, given), options, display, isolated=true_kl)
    if out and mixture:
        out.write_text(mixture.recipe.to_yaml(), encoding="utf-8")
    recommended = mixture.to_dict() if mixture else {}
    print_json(found.to_dict() | recommended) if as_json else show_sensitivity(found, mixture)


@app.command()
def verify(directory: Annotated[Path, typer.Argument(metavar="DIR")], as_json: Json = False) -> None:
    """Check that a finished directory is whole, finite, as its recipe says, and unchanged."""
    from llmquant.manifest import conversion_of
    from llmquant.verify import verify_checkpoint

    files = verify_checkpoint(directory)
    if as_json:
        print_json({"directory": str(directory), "verified": True, "files": files})
    else:
        made = conversion_of(directory)
        story = f"as it was converted to {made['to']}" if made else "whole, finite, as its recipe says"
        typer.echo(f"{directory}: {story}; {files} files unchanged")


@app.command()
def inspect(
    directory: Annotated[str | None, typer.Argument(metavar="DIR")] = None,
    runtime: Annotated[bool, typer.Option("--runtime", help="What computes on this machine, and why.")] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show architecture, parameters, bits per weight, and what quantizing would cost; or what computes here."""
    if directory is None and not runtime:
        raise typer.BadParameter("give a DIR, or --runtime")
    from llmquant.inspect import inspect_checkpoint, inspect_runtime

    facts = inspect_checkpoint(directory, trust_remote_code=trust_remote_code) if directory else {}
    facts |= inspect_runtime() if runtime else {}
    print_json(facts) if as_json else show_table(facts)


@app.command()
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...")],
    text_file: TextFile = None,
    dataset: DatasetName = None,
    protocol: ProtocolOption = ProtocolName.windows,
    seq_len: SeqLen = None,
    stride: Stride = None,
    max_windows: MaxWindows = None,
    baseline: Annotated[Path | None, typer.Option(help="What the others are beside. (default: the first)")] = None,
    max_memory: MaxMemory = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure tokens per second, too.")] = True,
    device: Device = "auto",
    plot: Annotated[Path | None, typer.Option(help="Quality against bits: a .png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Several checkpoints on one text: size, bits, perplexity, KL divergence, agreement, speed."""
    from llmquant.compare import compare_checkpoints, show_comparison
    from llmquant.compare import plot as plot_entries
    from llmquant.evaluate.protocol import Request

    with progress("compare") as noticed:
        entries = compare_checkpoints(
            directories,
            Source(text_file, dataset),
            Request(protocol.value, seq_len, stride, max_windows),
            baseline=baseline,
            max_memory=parse_size(max_memory),
            speed=speed,
            noticed=noticed,
            device=resolve_device(device),
        )
    if plot is not None:
        plot_entries(entries, plot)
    if as_json:
        print_json({"checkpoints": [entry.to_dict() for entry in entries]})
    else:
        show_comparison(entries)


@app.command()
def generate(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The text to answer.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    precision: Precision = PrecisionName.exact,
    device: Device = "auto",
    stats: Annotated[bool, typer.Option("--stats", help="Print tokens per second and the kernel in use.")] = False,
    as_json: Json = False,
) -> None:
    """Answer a prompt, greedily, through the model's chat template if it has one."""
    from llmquant.runtime.generate import generate as run_generate

    told = {"precision": precision.value, "device": resolve_device(device)}
    answer = run_generate(directory, prompt, max_new_tokens=max_new_tokens, **told)
    if as_json:
        print_json(answer.to_dict())
        return
    typer.echo(answer.text)
    if stats:
        console.print(answer.stats())


def run(model: str, out: Path, recipe: "Recipe", options: "Options", push: str | None, *, as_json: bool) -> None:
    """One run, its report, and where both are."""
    from llmquant.hub.upload import quantize_and_push
    from llmquant.pipeline import quantize as run_quantize
    from llmquant.report.build import write_report

    with Display() as display:
        work = partial(quantize_and_push, push) if push else run_quantize
        plan = work(model, out, recipe, options, display)
    page = write_report(out)
    if as_json:
        print_json({"out": str(out), "verified": True, **plan.to_dict()})
    else:
        console.print(f"[bold]{out}[/bold] is complete and verified; try: llmquant generate {out} -p 'Hello'")
        console.print(f"report: {page}")


def run_search(
    model: str, out: Path, recipe: "Recipe", options: "Options", target: "search.Target", *, as_json: bool
) -> None:
    """Each attempt as one line on stderr, whatever becomes of it."""
    from llmquant import search
    from llmquant.report.build import write_report

    told = lambda made: console.print(str(made), soft_wrap=True)  # noqa: E731
    with Display() as display:
        outcome = search.search(model, out, recipe, options, target, display, told)
    if outcome.best:
        write_report(out)
    if as_json:
        print_json(outcome.to_dict())
    outcome.require()
    console.print(f"[bold]{out}[/bold] keeps the bound: {outcome.best}", soft_wrap=True)


class Stopped(BaseException):
    """A signal asked us to stop. Not an Exception: no handler of the work may swallow it."""


def _stop(signum: int, _: object) -> None:
    raise Stopped(signum)


def main() -> None:
    """Run a command; every failure becomes one line and an exit code."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)
    try:
        app()
    except LlmquantError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or 'the machine'}: {error.strerror or error}\n")
        sys.exit(1)
    except Stopped as stopped:
        sys.stderr.write("stopped; finished layers are kept, the same command continues\n")
        sys.exit(128 + stopped.args[0])


if __name__ == "__main__":
    main()
