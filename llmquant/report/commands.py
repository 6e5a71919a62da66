"""`llmquant report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="What eval --json printed. (default: beside)")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The file. (default: DIR/report.html)")] = None,
) -> None:
    """Write what a finished directory tells of its run on one page, report.html."""
    from llmquant.report.build import write_report

    typer.echo(write_report(directory, evaluation, out))
