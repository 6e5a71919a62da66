"""Values on the command line that are more than a number: sizes, percentages, lists."""

import typer

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "B": 1}


def parse_size(text: str | None, option: str = "--max-memory") -> int | None:
    """Bytes, from a number and a unit; typer.BadParameter if it is none."""
    if text is None:
        return None
    number, unit = next(((text[: -len(u)], f) for u, f in UNITS.items() if text.upper().endswith(u)), (text, 1))
    try:
        return int(float(number) * unit)
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(f"{option} {text}: write a number and a unit, as in 16GB") from error


def parse_percent(text: str | None, option: str = "--max-increase") -> float | None:
    """A fraction, from a percentage; typer.BadParameter if it is none."""
    try:
        return None if text is None else float(text.removesuffix("%")) / 100
    except ValueError as error:
        raise typer.BadParameter(f"{option} {text}: write a percentage, as in 5%") from error


def parse_ranks(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--tensor-parallel {text}: write numbers of ranks, as in 1,2,4,8") from error
