"""The solver's inner loops, native against their definition in torch: seconds and ratios, both in one run.

python scripts/bench_solve.py [--json FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmquant.native import describe_backend
from llmquant.scheme import Scheme
from llmquant.solve import columns
from llmquant.solve.gptq import group_order, quantize_gptq
from llmquant.solve.hessian import inverse_factor
from llmquant.solve.refine import descend

SHAPES = ((3072, 576), (576, 1536), (4096, 4096))  # (m, n): SmolLM2's gate and up, its down, one of Llama's
SCHEME = Scheme(4, 64)
REPEATS = 5


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median of some runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def measure(m: int, n: int) -> dict[str, tuple[float, float]]:
    """Seconds of each step, in torch and native."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2 * n, n, generator=generator) * (0.5 + torch.rand(n, generator=generator))
    W, H = torch.randn(m, n, generator=generator) * 0.05, X.T @ X / len(X)
    factor = inverse_factor(H, group_order(H.diagonal(), 64), grouped=True)
    columns_of = W.T[factor.order].contiguous()
    scales, zeros = columns.search_columns(columns_of, torch.ones(n), 64, SCHEME)
    codes = torch.empty(columns_of.shape, dtype=torch.uint8)
    q = quantize_gptq(W, factor, H.diagonal(), SCHEME)

    def column_loop() -> None:
        rest = columns_of.clone()
        for start in range(0, n, columns.BLOCK):
            end = min(start + columns.BLOCK, n)
            grids = scales[start // 64 : end // 64], zeros[start // 64 : end // 64]
            columns.round_columns(
                rest[start:end], factor.U[start:, start:], *grids, codes[start:end], 64, SCHEME, search=False
            )

    steps: dict[str, Callable[[], Any]] = {
        "column loop": column_loop,
        "weighted scale search": lambda: columns.search_columns(columns_of, H.diagonal(), 64, SCHEME),
        "GPTQ, grids chosen in the loop": lambda: quantize_gptq(W, factor, H.diagonal(), SCHEME),
        "coordinate descent": lambda: descend(W, H, q, SCHEME),
    }
    found = {}
    native = columns._library
    for name, step in steps.items():
        own = seconds(step, REPEATS)
        columns._library = lambda work: None
        slow = seconds(step, 1)
        columns._library = native
        found[name] = (slow, own)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{describe_backend()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'rows x columns':>14}  {'step':32}{'torch':>10}{'native':>10}{'ratio':>8}")
    results = []
    for m, n in SHAPES:
        for step, (slow, own) in measure(m, n).items():
            print(f"{m:>7}x{n:<6}  {step:32}{slow:>9.3f}s{own:>9.4f}s{slow / own:>7.0f}x", flush=True)
            results.append({"rows": m, "columns": n, "step": step, "torch": slow, "native": own})
    if args.json:
        args.json.write_text(json.dumps({"backend": describe_backend(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
