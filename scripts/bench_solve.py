"""The solver's inner loops, native against their definition in torch: seconds and ratios, both in one run.

python scripts/bench_solve.py [--json FILE] [--device cuda]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.bench.gpu import machine as gpu_machine
from llmquant.native import describe_backend
from llmquant.scheme import Scheme
from llmquant.solve import columns
from llmquant.solve.gptq import group_order, quantize_gptq
from llmquant.solve.hessian import inverse_factor

SHAPES = ((3072, 576), (576, 1536), (4096, 4096))  # (m, n): SmolLM2's gate and up, its down, one of Llama's
GPU_SHAPES = ((4096, 4096), (8192, 8192))
SCHEME = Scheme(4, 64)
REPEATS = 5


def seconds(work: Callable[[], Any], prepare: Callable[[], Any], repeats: int) -> float:
    """Median of some runs, after one to warm up; what `prepare` takes does not count."""
    times = []
    for _ in range(repeats + 1):
        prepare()
        wait()
        started = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def measure(m: int, n: int, device: str) -> dict[str, tuple[float, float]]:
    """Seconds of each loop over all blocks of a weight, in torch and native. What is between the blocks is a matrix
    product either way, and only in the last line."""
    generator = torch.Generator().manual_seed(0)
    X = (torch.randn(2 * n, n, generator=generator) * (0.5 + torch.rand(n, generator=generator))).to(device)
    W, H = torch.randn(m, n, generator=generator).to(device) * 0.05, X.T @ X / len(X)
    factor = inverse_factor(H, group_order(H.diagonal(), SCHEME.group_size), grouped=True)
    ordered = W.T[factor.order].contiguous()
    scales, zeros = columns.search_columns(ordered, torch.ones(n, device=device), SCHEME.group_size, SCHEME)
    work, codes = torch.empty_like(ordered), torch.zeros_like(ordered, dtype=torch.uint8)
    blocks = [slice(start, min(start + columns.BLOCK, n)) for start in range(0, n, columns.BLOCK)]
    groups = [slice(block.start // SCHEME.group_size, -(-block.stop // SCHEME.group_size)) for block in blocks]

    def loop(step: Callable[..., Any], matrix: Tensor, **options: Any) -> Callable[[], None]:
        def run() -> None:
            for block, own in zip(blocks, groups, strict=True):
                task = work[block], matrix[block.start :, block.start :], scales[own], zeros[own], codes[block]
                step(*task, SCHEME.group_size, SCHEME, **options)

        return run

    steps: dict[str, Callable[[], Any]] = {
        "weighted scale search": lambda: columns.search_columns(ordered, H.diagonal(), SCHEME.group_size, SCHEME),
        "column loop, grids given": loop(columns.round_columns, factor.U, search=False),
        "column loop, grids searched in it": loop(columns.round_columns, factor.U, search=True),
        "coordinate descent": loop(columns.descend_columns, H),
        "GPTQ as a whole": lambda: quantize_gptq(W, factor, H.diagonal(), SCHEME),
    }
    if device == "cuda":  # the others have no kernel of their own there
        steps = {name: step for name, step in steps.items() if name.startswith(("column loop", "GPTQ"))}
    found = {}
    loops = columns._library, columns._gpu_loop
    for name, step in steps.items():
        own = seconds(step, lambda: work.copy_(ordered), REPEATS)
        columns._library, columns._gpu_loop = (lambda *_, **__: None,) * 2
        slow = seconds(step, lambda: work.copy_(ordered), 1)
        columns._library, columns._gpu_loop = loops
        found[name] = (slow, own)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    facts = gpu_machine() if args.device == "cuda" else {"backend": describe_backend()}
    print(f"{facts['backend']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'rows x columns':>14}  {'step':34}{'torch':>10}{'native':>10}{'ratio':>8}")
    results = []
    for m, n in GPU_SHAPES if args.device == "cuda" else SHAPES:
        for step, (slow, own) in measure(m, n, args.device).items():
            print(f"{m:>7}x{n:<6}  {step:34}{slow:>9.3f}s{own:>9.4f}s{slow / own:>7.0f}x", flush=True)
            results.append({"rows": m, "columns": n, "step": step, "torch": slow, "native": own})
    if args.json:
        args.json.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
