"""`llmquant bench kernels` for the documentation: every shape, into a JSON file and a roofline.

    python scripts/bench_kernels.py docs/results/kernels.json [--shapes 4096x4096,...] [--tokens 1,4,16,128,512]

Peers are torch in fp32 and bf16, torch's int4 kernel, ONNX Runtime's MatMulNBits where `onnx` and `onnxruntime` are
installed, and llama.cpp's Q4_0 where `llama-cpp-python` is. What the file holds already is not measured again.
"""

import argparse
import json
import math
import re
from pathlib import Path

import torch
from typer import BadParameter

from llmquant.bench.commands import machine, parse_shape
from llmquant.bench.kernels import SHAPES, TOKENS, Result, measure
from llmquant.scheme import Scheme


def plot(results: list[Result], path: Path) -> None:
    """Operations per second against operations per byte of the weight, below what memory and torch's bf16 allow."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "llmquant"  # the same results give the same file
    from matplotlib import pyplot as plt

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
    parser.add_argument("--shapes", default=",".join(f"{n}x{m}" for n, m in SHAPES))
    parser.add_argument("--tokens", type=counts, default=",".join(map(str, TOKENS)))
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128), default=128)
    args = parser.parse_args()
    if not args.json.parent.is_dir():
        parser.error(f"{args.json}: there is no directory {args.json.parent}")
    try:
        shapes = [parse_shape(text, args.group_size) for text in args.shapes.split(",")]
    except BadParameter as error:
        parser.error(str(error))
    found = [Result(**row) for row in json.loads(args.json.read_text())["results"]] if args.json.exists() else []
    with torch.inference_mode():
        for n, m in shapes:
            known = {result.tokens for result in found if (result.n, result.m) == (n, m)}
            left = [count for count in args.tokens if count not in known]
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
