"""What a conversion is going to write."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llmquant.checkpoint.writer import copy_file, write_json
from llmquant.convert.source import Source

Files = dict[str, Callable[[Path], str]]  # name -> what writes the file and gives its sha256


class Product(NamedTuple):
    """The files in the order they are written, the last of which makes the directory complete; and what to know."""

    files: Files
    notes: tuple[str, ...]


def side_files(source: Source) -> Files:
    """Tokenizer, templates, licence, as they are."""
    root = source.checkpoint.root
    return {name: partial(copy_file, root / name) for name in source.checkpoint.side_files()}


def json_file(value: Any) -> Callable[[Path], str]:
    return lambda path: write_json(path, value)
