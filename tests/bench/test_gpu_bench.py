"""The arithmetic around measurements on a GPU; what is measured there needs one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmquant.bench import gpu
from llmquant.bench.gpu import Result
from llmquant.bench.gpu_products import DENSE, makers
from llmquant.scheme import Scheme

SCRIPTS = Path(__file__).parents[2] / "scripts"
MB = 1 << 20


def result(backend: str, tokens: int, seconds: float, n: int = 4096, m: int = 8192) -> Result:
    return Result(n, m, tokens, backend, seconds, 0.9 * seconds, 1.1 * seconds, n * m // 2, 7, 1e-3)


@pytest.mark.parametrize(("nbytes", "copies"), [(9 * MB, 23), (50 * MB, 4), (199 * MB, 2), (500 * MB, 2)])
def test_copies_are_four_times_the_cache_and_at_least_two(nbytes: int, copies: int) -> None:
    assert gpu.copies_for(nbytes, 50 * MB) == copies
    assert copies * nbytes >= 4 * 50 * MB


def test_shapes_fit_every_group_and_peer() -> None:
    assert all(n % 128 == m % 64 == 0 for n, m in gpu.SHAPES)
    assert (gpu.TOKENS[0], gpu.TOKENS[-1]) == (1, 4096)


def test_spread() -> None:
    assert gpu.spread([float(i) for i in range(101)]) == (10.0, 50.0, 90.0)


def test_graphs_are_replayed_in_turn_and_never_in_one_order() -> None:
    replayed: list[str] = []

    class Replays:
        def __init__(self, name: str, replays: int) -> None:
            self.name, self.replays = name, replays

        def seconds(self) -> float:
            replayed.append(self.name)
            return float(len(replayed))

    times = gpu.replay_in_turn({name: Replays(name, count) for name, count in (("a", 9), ("b", 9), ("c", 4))})
    assert {name: len(found) for name, found in times.items()} == {"a": 9, "b": 9, "c": 4}
    rounds = [replayed[3 * i : 3 * i + 3] for i in range(4)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert [replayed[int(time) - 1] for time in times["b"]] == ["b"] * 9


def test_rates_count_all_bytes_and_operations() -> None:
    r = result("llmquant", 16, 1e-3)
    assert r.bandwidth == pytest.approx((4096 * 4096 + 32 * (4096 + 8192)) * 1e3)
    assert r.flops == pytest.approx(2 * 16 * 4096 * 8192 * 1e3)


def test_a_line_says_how_near_the_limits_and_how_much_faster() -> None:
    results = [result("llmquant", 1, 1e-5), result(DENSE, 1, 3e-5), result(DENSE, 2, 1.0), result("gemlite", 1, 2e-5)]
    (line,) = gpu.table(results, {"read_bandwidth": 2 * results[0].bandwidth, "peak_flops": 100 * results[0].flops})
    assert " 10.0 us (9.0 to 11.0)" in line
    assert " 50% of reading" in line
    assert " 1% of peak  3.00x cuBLAS, 2.00x gemlite" in line


def test_speedups_are_over_cublas_at_the_same_tokens() -> None:
    results = [result("llmquant", 1, 1.0), result(DENSE, 1, 3.0), result("llmquant", 2, 1.0)]
    results.append(result(DENSE, 1, 9.0, m=64))
    assert gpu.speedups(results, 4096, 8192) == {"llmquant": [(1, 3.0)], DENSE: [(1, 1.0)]}


def test_our_own_kernels_stand_in_the_order_of_their_times() -> None:
    times = {"llmquant": 1e-6, "llmquant gemv": 3e-5, DENSE: 1e-6, "llmquant split": 2e-5}
    results = [result(name, 4, seconds) for name, seconds in times.items()]
    results += [result("llmquant wgmma", 8, 1e-5), result(DENSE, 8, 1e-5)]
    assert gpu.fastest(results) == ["  4096x8192      4 tokens  split 20.0 us, gemv 30.0 us"]


def test_torch_is_always_a_peer() -> None:
    assert DENSE in makers(torch.float16)
    assert "torch int4pack" in makers(torch.bfloat16)
    assert "torch int4pack" not in makers(torch.float16)  # it knows bf16 alone


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "bench_kernels.py"), str(tmp_path / "a.json"), "--device", "cuda"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].endswith("sees no CUDA device")


@pytest.mark.parametrize("held", ["", "{}", "[1]"], ids=["empty", "another", "a list"])
def test_a_file_of_something_else_is_left_alone(held: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(held)
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "bench_kernels.py"), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"error: {path} holds no results of this benchmark; name another file, or remove it\n"
    assert path.read_text() == held


def test_the_plot_names_device_and_date(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(SCRIPTS))
    from bench_kernels import plot_speedups

    facts = {"device": "NVIDIA Test", "torch": "2.13", "cuda": "13.0", "date": "2026-01-01"}
    names, shapes = ("llmquant", DENSE), (64, 128, 256)
    results = [result(name, tokens, 1.0, m=m) for m in shapes for name in names for tokens in (1, 2)]
    plot_speedups(results, facts, tmp_path / "plot.svg")
    assert "NVIDIA Test, torch 2.13, CUDA 13.0, 2026-01-01" in (tmp_path / "plot.svg").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_measurements_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REPLAYS", "COLDNESS"):
        monkeypatch.setattr(gpu, name, 3)
    found = list(gpu.measure(1024, 512, Scheme(4, 128), (1, 40), makers(torch.bfloat16), torch.bfloat16))
    measured = [one for one in found if isinstance(one, Result)]
    assert {one.backend for one in measured} >= {DENSE}
    assert not [one for one in found if one.backend.startswith("llmquant") and one not in measured]
    assert all(0 < one.fast <= one.seconds <= one.slow for one in measured)
    json.dumps(gpu.machine() | gpu.limits(torch.bfloat16))
