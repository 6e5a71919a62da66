"""The benchmarks on small things: every contestant computes what it should, and the command prints the figures."""

import json
import statistics
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llmquant.bench import generate, kernels, timing
from llmquant.bench.products import READING, makers
from llmquant.cli import app
from llmquant.errors import CheckpointError
from llmquant.native import active_backend
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.loader import load
from llmquant.scheme import Scheme, dequantize

# What 4-bit products may err: activations in 8 bits, in groups of 32 and of more.
ERROR = 2e-2


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TURNS", 2)
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    monkeypatch.setattr(timing, "AWAKE", 0.0)
    monkeypatch.setattr(kernels, "ROTATED", 1)
    monkeypatch.setattr(generate, "ROUNDS", 1)


@pytest.mark.parametrize("group_size", [32, 64])
def test_every_backend_computes_the_product(group_size: int) -> None:
    scheme = Scheme(4, group_size)
    q = kernels.random_weight(96, 128, scheme, 0)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ dequantize(q, scheme).double().T
    found = {name: product for make in makers() for name, product in make(q, scheme).items()}
    assert {"llmquant exact", "llmquant int8", "torch bf16", "torch int4pack", READING} <= set(found)
    for name, product in found.items():
        assert product.nbytes > 0
        if name != READING:
            y = product.call(x)
            assert y.shape == (5, 96), name
            assert float((y.double() - exact).norm() / exact.norm()) < ERROR, name


def test_contestants_take_turns(quick: None) -> None:
    calls: list[str] = []
    times = timing.in_turn({name: repeat(lambda name=name: calls.append(name)) for name in "ab"})
    turns = [calls[i : i + 1 + timing.EACH_TURN] for i in range(0, len(calls), 1 + timing.EACH_TURN)]
    assert all(len(set(turn)) == 1 for turn in turns)
    assert [{turns[i][0], turns[i + 1][0]} for i in (0, 2)] == [{"a", "b"}] * 2
    assert {name: len(taken) for name, taken in times.items()} == {"a": 6, "b": 6}
    assert all(statistics.median(taken) >= 0 for taken in times.values())


def test_bench_kernels(quick: None) -> None:
    run = CliRunner().invoke(app, "bench kernels --shape 128x96 --tokens 1 --tokens 3 --group-size 32 --json".split())
    assert run.exit_code == 0, run.output
    facts = json.loads(run.stdout)
    assert facts["threads"] == torch.get_num_threads()
    rows = {(row["backend"], row["tokens"]): row for row in facts["results"]}
    for tokens in (1, 3):
        row = rows["llmquant exact", tokens]
        assert row["relative_error"] < 1e-3
        assert row["flops"] == pytest.approx(2 * 128 * 96 * tokens / row["seconds"])
        assert row["bandwidth"] > 0


@pytest.mark.parametrize("shape", ["128", "128x", "0x96", "130x96", "128x96x2"])
def test_a_shape_that_is_none_is_refused(shape: str) -> None:
    run = CliRunner().invoke(app, ["bench", "kernels", "--shape", shape, "--group-size", "32"])
    assert run.exit_code == 2
    assert "--shape" in run.output


def test_bench_generate(quick: None, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint(arch="llama")
    quantize(source, tmp_path / "packed", Recipe(method="rtn", scheme=Scheme(4, 32)))
    command = ["bench", "generate", str(tmp_path / "packed"), "--baseline", str(source)]
    told = ["--prompt-tokens", "40", "--new-tokens", "4"]
    run = CliRunner().invoke(app, [*command, *told, "--json", "--sequences", "3", "--sequences", "1"])
    assert run.exit_code == 0, run.output
    results = json.loads(run.stdout)["results"]
    names = ["llmquant int8", "llmquant exact", "transformers bf16"]
    assert [(row["name"], row["sequences"]) for row in results] == [(name, n) for name in names for n in (1, 3)]
    assert all(row["prompt_per_second"] > 0 and row["new_per_second"] > 0 for row in results)
    table = CliRunner().invoke(app, [*command, *told])
    assert "transformers bf16" in table.stdout


@pytest.mark.parametrize(("arch", "together"), [("llama", True), ("gemma2", False)])
def test_sequences_are_written_as_each_alone(
    make_checkpoint: Callable[..., Path], tmp_path: Path, arch: str, together: bool
) -> None:
    packed = tmp_path / "packed"
    quantize(make_checkpoint(arch=arch), packed, Recipe(method="rtn", scheme=Scheme(4, 32)))
    model = generate.OfLlmquant(load(packed))
    ids = torch.arange(3 * 16).view(3, 16) + 3
    with torch.inference_mode():
        assert model._write_together(ids, 4) == (together and active_backend() == "native")
        model.write(ids, 4)


def test_what_cannot_be_measured_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """By one line, whether llama.cpp is installed or not."""
    source, packed, file = make_checkpoint(arch="llama"), tmp_path / "packed", tmp_path / "x.gguf"
    quantize(source, packed, Recipe(method="rtn", scheme=Scheme(4, 32)))
    file.touch()
    for message, asked in (
        ("is not quantized; give it as --baseline", (source, None, [])),
        ("is quantized already", (packed, packed, [])),
        ("nowhere: is not a directory", (packed, tmp_path / "nowhere", [])),
        (r"x\.gguf: (needs llama.cpp|llama.cpp cannot load it)", (packed, None, [file])),
    ):
        with pytest.raises(CheckpointError, match=message):
            generate.contestants(*asked, 32)
