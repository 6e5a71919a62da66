"""scripts/bench_serve.py on a server of its own and another one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.scheme import Scheme

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_serve.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300
    )


def test_users_are_served_and_timed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    packed, out = tmp_path / "packed", tmp_path / "serve.json"
    quantize(tiny_checkpoint, packed, Recipe(method="rtn", scheme=Scheme(4, 32)))
    done = run(out, packed, "--users", "3,1", "--prompt-tokens", 8, "--new-tokens", 4)
    assert done.returncode == 0, done.stderr
    facts = json.loads(out.read_text())
    assert (facts["prompt_tokens"], facts["new_tokens"]) == (8, 4)
    assert [(row["server"], row["users"]) for row in facts["results"]] == [("llmquant", 1), ("llmquant", 3)]
    for row in facts["results"]:
        assert 0 < row["next_seconds"]
        assert 0 < row["first_seconds"] < 4 * row["users"] / row["tokens_per_second"]
    assert "3 users" in done.stderr


def test_what_cannot_be_measured_is_told_in_a_line(tmp_path: Path) -> None:
    for arguments, words in (
        ((tmp_path / "x.json", tmp_path), f"error: the server ended: error: {tmp_path}"),
        ((tmp_path / "x.json", tmp_path, "--peer", "nothing"), "--peer: give NAME=URL"),
        ((tmp_path / "x.json", tmp_path, "--users", "0,2"), "--users: '0,2': give numbers from 1 on"),
        ((tmp_path / "nowhere" / "x.json", tmp_path), f"there is no directory {tmp_path / 'nowhere'}"),
    ):
        done = run(*arguments)
        assert done.returncode != 0
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.json").exists()
