"""JSON from strangers: whatever two readers could understand differently is refused.

The standard parser keeps the last of two equal keys and takes NaN, Infinity and 1e999; a checkpoint that says
one thing to a scanner and another to a loader is built from exactly these.
"""

import json
from pathlib import Path
from typing import Any

from llmquant.errors import CheckpointError


def parse_object(raw: bytes, where: Path) -> dict[str, Any]:
    """The JSON object in `raw` (UTF-8, no BOM); `where` is the file that a CheckpointError names."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise CheckpointError(f"{where}: JSON is nested too deep; download the file again") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}; download the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(value).__name__}, not an object; download the file again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if number - number != 0:
        raise ValueError(f"the number {text[:20]} is not finite")
    return number
