#!/usr/bin/env python3
"""Does peak memory grow with the number of layers? It must not: one layer is in memory at a time.

Quantizes synthetic Llama checkpoints that differ only in depth, each in a process of its own, and prints
the peak resident set of each as the operating system counted it.

    python scripts/bench_memory.py --layers 4 16
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

MAKE = Path(__file__).with_name("make_tiny.py")
SHAPE = ["--hidden", "1024", "--intermediate", "2816", "--heads", "16", "--shard-mb", "100"]
RECIPE = ["--method", "gptq", "--group-size", "128", "--samples", "8", "--seq-len", "256"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16], help="depths to compare with the first")
    options = parser.parse_args()
    peaks = {}
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as work:
            model, out = Path(work) / "model", Path(work) / "out"
            subprocess.run([sys.executable, MAKE, model, "--layers", str(layers), *SHAPE], check=True)
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            command = [sys.executable, "-m", "llmquant.cli", "quantize", model, "-o", out, *RECIPE]
            peaks[layers] = peak_of(command)
        ratio = peaks[layers] / peaks[options.layers[0]]
        line = f"{layers:3d} layers, {size / 1e6:7.1f} MB: peak {peaks[layers] / 1e6:7.1f} MB, {ratio:.3f} x\n"
        sys.stderr.write(line)
    sys.stdout.write(json.dumps({"peak_rss_bytes": peaks}) + "\n")


def peak_of(command: list[str | Path]) -> int:
    """Peak resident set, in bytes, of one command: measured in a child that has no other children."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *map(str, command)], check=True, stdout=subprocess.PIPE, text=True
    )
    return int(done.stdout)


def measure(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    sys.stdout.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024))


if __name__ == "__main__":
    measure(sys.argv[2:]) if sys.argv[1:2] == ["--measure"] else main()
