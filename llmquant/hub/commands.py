"""`llmquant push`."""

from pathlib import Path
from typing import Annotated

import typer

from llmquant.display import console, print_json


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    name: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository; it is made if need be.")],
    public: Annotated[bool, typer.Option("--public", help="Let everyone read it.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Hub name of the original, if it was a directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Verify a directory and upload it to the Hub. The same command again sends only what is missing."""
    from llmquant.hub import upload

    sending = lambda file: console.print(f"sending {file}")  # noqa: E731
    url = upload.push(directory, name, public=public, base_model=base_model, sending=sending)
    print_json({"directory": str(directory), "commit": url}) if as_json else typer.echo(url)
