"""`llmquant bench kernels` for the documentation: every shape, into a JSON file and a roofline.

    python scripts/bench_kernels.py docs/results/kernels.json [--shapes 4096x4096,...] [--tokens 1,4,16,128,512]
    python scripts/bench_kernels.py docs/results/kernels-gpu.json --device cuda [--dtype fp16] [--tune]
        [--paths] [--backends llmquant,cuBLAS]

On the CPU peers are torch in fp32 and bf16, torch's int4 kernel, ONNX Runtime's MatMulNBits where `onnx` and
`onnxruntime` are installed, and llama.cpp's Q4_0 where `llama-cpp-python` is. What the file holds already is not
measured again. On a GPU they are cuBLAS, torch's int4 kernel, gemlite where it is installed, and Marlin and Machete
where vLLM is; --paths measures each of our kernels by itself, from which the tables of tokens are to be made, and
--tune lets the Triton kernel try its tiles first. --backends measures those alone whose names begin so.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from llmquant.bench import gpu
from llmquant.bench.gpu_products import makers
from llmquant.bench.kernels import SHAPES, TOKENS, Result, machine, measure, parse_shape
from llmquant.scheme import Scheme

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "llmquant"  # the same results give the same file
    from matplotlib import pyplot

    return pyplot


def plot(results: list[Result], path: Path) -> None:
    """Operations per second against operations per byte of the weight, below what memory and torch's bf16 allow."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for backend in dict.fromkeys(result.backend for result in results):
        points = sorted(
            (2 * r.tokens * r.n * r.m / r.bytes, r.flops / 1e9)
            for r in results
            if r.backend == backend and (r.n, r.m) == (results[0].n, results[0].m)
        )
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=backend)
    bandwidth = max(r.bandwidth for r in results) / 1e9
    dense = max(r.flops for r in results if r.backend == "torch bf16") / 1e9
    reach = [2.0**i for i in range(-1, 12)]
    axis.plot(reach, [bandwidth * x for x in reach], "k--", linewidth=1, label=f"memory, {bandwidth:.0f} GB/s")
    axis.axhline(dense, color="k", linestyle=":", linewidth=1, label=f"torch's best bf16 product, {dense:.0f} GFLOP/s")
    axis.set(xscale="log", yscale="log", xlabel="operations per byte of the weight", ylabel="GFLOP/s")
    axis.set(ylim=(1, 2 ** math.ceil(math.log2(max(r.flops for r in results) / 1e9))))
    axis.set_title(f"{results[0].n} x {results[0].m}, one weight for 1 to {max(r.tokens for r in results)} tokens")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def counts(text: str) -> list[int]:
    """Positive numbers, separated by commas."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text}: give numbers like {','.join(map(str, TOKENS))}")
    return [int(count) for count in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes")
    parser.add_argument("--tokens", type=counts)
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128), default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of activations on a GPU")
    parser.add_argument("--paths", action="store_true")
    parser.add_argument("--backends", type=lambda text: tuple(text.split(",")), default=("",), metavar="PREFIX,...")
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    if args.device == "cpu" and (args.paths or args.tune or args.backends != ("",)):
        parser.error("--paths, --tune and --backends go with --device cuda")
    if not args.json.parent.is_dir():
        parser.error(f"{args.json}: there is no directory {args.json.parent}")
    given, counted = (gpu.SHAPES, gpu.TOKENS) if args.device == "cuda" else (SHAPES, TOKENS)
    try:
        shapes = [parse_shape(text, args.group_size) for text in args.shapes.split(",")] if args.shapes else given
    except ValueError as error:
        parser.error(f"--shapes {error}")
    with torch.inference_mode():
        (on_gpu if args.device == "cuda" else on_cpu)(args, shapes, args.tokens or counted)


def on_gpu(args: argparse.Namespace, shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> None:
    """All anew, into one file: figures of one run are comparable, those of several are not."""
    dtype, scheme = DTYPES[args.dtype], Scheme(4, args.group_size)
    limits = gpu.limits(dtype)
    reading, peak = limits["read_bandwidth"] / 1e9, limits["peak_flops"] / 1e12
    print(f"reading {reading:.0f} GB/s, cuBLAS {peak:.0f} TFLOP/s", flush=True)
    facts = {**gpu.machine(), **limits, "dtype": args.dtype, "group_size": args.group_size}
    contestants = {
        name: make for name, make in makers(dtype, paths=args.paths).items() if name.startswith(args.backends)
    }
    if not contestants:
        sys.exit(f"error: --backends: there are {', '.join(makers(dtype, paths=args.paths))}")
    found: list[gpu.Result] = []
    refused: list[gpu.Refusal] = []
    for n, m in shapes:
        if args.tune:
            gpu.tune_triton(n, m, scheme, tokens, dtype)
        before = len(found)
        for one in gpu.measure(n, m, scheme, tokens, contestants, dtype):
            if isinstance(one, gpu.Result):
                found.append(one)
            else:
                refused.append(one)
            rows = {"results": [one._asdict() for one in found], "refused": [one._asdict() for one in refused]}
            args.json.write_text(json.dumps(facts | rows, indent=1) + "\n")  # at once: a GPU's time may be over
        print("\n".join(gpu.table(found[before:], limits)), flush=True)
    print("\n".join(gpu.fastest(found)))
    for (backend, reason), count in Counter((one.backend, one.reason) for one in refused).items():
        print(f"{backend}: {count} of its products were not measured: {reason}")
    with suppress(ModuleNotFoundError):  # a bare machine may lack matplotlib: the figures are in the file
        plot_speedups(found, facts, args.json.with_suffix(".svg"))


def plot_speedups(results: list[gpu.Result], facts: dict[str, Any], path: Path) -> None:
    """Times as fast as cuBLAS, by tokens: a panel for each shape."""
    plt = pyplot()
    shapes = list(dict.fromkeys((result.n, result.m) for result in results))
    figure, axes = plt.subplots(-(-len(shapes) // 2), 2, figsize=(10, 2.8 * -(-len(shapes) // 2)), squeeze=False)
    for axis, (n, m) in zip(axes.flat, shapes, strict=False):
        for backend, points in gpu.speedups(results, n, m).items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=backend)
        axis.set(xscale="log", title=f"{n} x {m}", xlabel="tokens", ylabel="times cuBLAS", ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7)
    figure.suptitle(f"{facts['device']}, torch {facts['torch']}, CUDA {facts['cuda']}, {facts['date']}")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def on_cpu(args: argparse.Namespace, shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> None:
    try:
        found = [Result(**row) for row in json.loads(args.json.read_text())["results"]] if args.json.exists() else []
    except (ValueError, KeyError, TypeError):
        sys.exit(f"error: {args.json} holds no results of this benchmark; name another file, or remove it")
    for n, m in shapes:
        known = {result.tokens for result in found if (result.n, result.m) == (n, m)}
        left = [count for count in tokens if count not in known]
        for result in measure(n, m, Scheme(4, args.group_size), left) if left else ():
            found.append(result)
            print(
                f"{n:>6}x{m:<6} {result.tokens:>4} tokens  {result.backend:26}{1e3 * result.seconds:>9.3f} ms"
                f"{result.of_bandwidth:>7.0%} of {result.bandwidth / 1e9:.1f} GB/s{result.flops / 1e9:>8.0f}"
                f" GFLOP/s  error {result.relative_error:.1e}",
                flush=True,
            )
        args.json.write_text(json.dumps(machine() | {"results": [r._asdict() for r in found]}, indent=1) + "\n")
    plot(found, args.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
