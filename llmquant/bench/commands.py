"""`llmquant bench`: what the command line asks of this package."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from llmquant.bench.timing import SHORT

app = typer.Typer(help="Speed on this machine, beside the peers that are installed.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
console = Console(stderr=True)


@app.command()
def kernels(
    shape: Annotated[list[str] | None, typer.Option(metavar="NxM", help="In features x out features.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Rows of activations.")] = None,
    group_size: Annotated[int, typer.Option(help="32, 64 or 128.")] = 128,
    as_json: Json = False,
) -> None:
    """Products with one packed weight, beside torch's, ONNX Runtime's and llama.cpp's. Takes minutes for each shape."""
    import torch

    from llmquant.bench import kernels as products
    from llmquant.scheme import Scheme

    if group_size not in (32, 64, 128):
        raise typer.BadParameter(f"--group-size {group_size}: use 32, 64 or 128")
    try:
        shapes = [products.parse_shape(text, group_size) for text in shape] if shape else list(products.SHAPES)
    except ValueError as error:
        raise typer.BadParameter(f"--shape {error}") from error
    scheme, found = Scheme(4, group_size), list[products.Result]()
    table = _table("shape", "tokens", "backend", "ms", "of bandwidth", "GFLOP/s", "error")
    with torch.inference_mode():
        for n, m in shapes:
            for result in products.measure(n, m, scheme, tokens or products.TOKENS):
                found.append(result)
                table.add_row(
                    f"{n}x{m}",
                    str(result.tokens),
                    result.backend,
                    f"{1e3 * result.seconds:.3f}",
                    f"{result.of_bandwidth:.0%} of {result.bandwidth / 1e9:.0f} GB/s",
                    f"{result.flops / 1e9:.0f}",
                    f"{result.relative_error:.1e}",
                )
                console.print(f"{n}x{m}, {result.tokens} tokens: {result.backend}, {1e3 * result.seconds:.3f} ms")
    _show(table, products.facts(found), as_json)


@app.command()
def generate(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    baseline: Annotated[Path | None, typer.Option(help="The original checkpoint, run by transformers in bf16.")] = None,
    gguf: Annotated[list[Path] | None, typer.Option(help="A file for llama.cpp; needs llama-cpp-python.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=SHORT)] = 512,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    sequences: Annotated[list[int] | None, typer.Option(min=1, help="Written at once. (default: 1)")] = None,
    as_json: Json = False,
) -> None:
    """Tokens per second of a packed checkpoint: reading a prompt, and writing."""
    from llmquant.bench.generate import contestants, measure
    from llmquant.checkpoint.reader import Checkpoint
    from llmquant.model.shell import read_config

    room, counts = max(prompt_tokens, SHORT + new_tokens), sorted(set(sequences or [1]))
    models = contestants(directory, baseline, gguf or [], room, counts[-1])
    vocab_size = int(read_config(Checkpoint.open(directory)).vocab_size)
    results = list(measure(models, prompt_tokens, new_tokens, vocab_size, counts))
    table = _table("model", f"prompt of {prompt_tokens}, tokens/s", "sequences", f"{new_tokens} new, tokens/s")
    for name, count, read, written in results:
        table.add_row(name, f"{read:.0f}", str(count), f"{written:.1f}")
    _show(table, [result._asdict() for result in results], as_json)


def _table(*columns: str) -> Table:
    import torch

    from llmquant.native import describe_backend

    table = Table(caption=", ".join(f"{value}" for value in (describe_backend(), f"{torch.get_num_threads()} threads")))
    for column in columns:
        table.add_column(column, justify="left" if column in ("backend", "model") else "right")
    return table


def _show(table: Table, results: list[dict[str, Any]], as_json: bool) -> None:
    from llmquant.bench.kernels import machine

    if as_json:
        sys.stdout.write(json.dumps(machine() | {"results": results}, indent=2) + "\n")
    else:
        Console().print(table)
