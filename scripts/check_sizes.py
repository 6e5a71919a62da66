#!/usr/bin/env python3
"""Check that llmquant/ stays small: lines of its files and of its functions. Prints what is too long; exit code 1."""

import ast
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEDIAN_FILE, LONGEST_FILE = 200, 400
MEDIAN_FUNCTION, P95_FUNCTION, LONGEST_FUNCTION = 12, 45, 80

Sizes = dict[str, int]  # lines by place


def main() -> None:
    files: Sizes = {}
    functions: Sizes = {}
    for path in sorted((ROOT / "llmquant").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        name = str(path.relative_to(ROOT))
        files[name] = len(source.splitlines())
        functions |= function_sizes(name, ast.parse(source))
    problems = [
        *too_long(files, LONGEST_FILE),
        *too_long(functions, LONGEST_FUNCTION),
        *over("median file", statistics.median(files.values()), MEDIAN_FILE),
        *over("median function", statistics.median(functions.values()), MEDIAN_FUNCTION),
        *over("95th percentile of functions", p95(functions), P95_FUNCTION),
    ]
    sys.stdout.write("\n".join([*problems, summary(files, functions)]) + "\n")
    sys.exit(1 if problems else 0)


def function_sizes(name: str, tree: ast.Module) -> Sizes:
    return {
        f"{name}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def too_long(sizes: Sizes, limit: int) -> list[str]:
    return [f"{place}: {lines} lines, at most {limit}" for place, lines in sizes.items() if lines > limit]


def over(what: str, value: float, limit: int) -> list[str]:
    return [f"{what}: {value:g} lines, at most {limit}"] if value > limit else []


def p95(sizes: Sizes) -> int:
    """By nearest rank."""
    return sorted(sizes.values())[math.ceil(0.95 * len(sizes)) - 1]


def summary(files: Sizes, functions: Sizes) -> str:
    return (
        f"{len(files)} files, median {statistics.median(files.values()):g} lines, longest {max(files.values())}; "
        f"{len(functions)} functions, median {statistics.median(functions.values()):g}, "
        f"95 % within {p95(functions)}, longest {max(functions.values())}"
    )


if __name__ == "__main__":
    main()
