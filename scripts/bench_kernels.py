"""Products with packed weights beside their peers: milliseconds, in one run, in turn, weights from beyond the caches.

    python scripts/bench_kernels.py [--shapes 4096x4096,...] [--tokens 1,4,16,128,512] [--json FILE]

Peers are torch in fp32 and bf16, torch's int4 kernel, and ONNX Runtime's MatMulNBits where `onnx` and `onnxruntime` are
installed. Each call takes the next of so many copies of the weight that none is in a cache when its turn comes. Given
is the median; beside it the rate, and the share of the bandwidth that reading as many bytes reached in its turn.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.kernels import ops  # noqa: F401  (defines torch.ops.llmquant)
from llmquant.kernels.cpu import PLANES
from llmquant.kernels.layout import pack
from llmquant.native import describe_backend
from llmquant.scheme import Quantized, Scheme, dequantize

SHAPES = "4096x4096,2048x8192,4096x14336,14336x4096"  # n x m: in features, out features
TOKENS = "1,4,16,128,512"
ROTATED = 192 * 2**20  # bytes of weights, and at least two
TURNS, EACH_TURN, SECONDS = 20, 3, 1.5  # of each backend at the most
READING = "reading memory"
PAUSE, AWAKE = 0.02, 0.01  # seconds

Call = Callable[[Tensor], Any]


def ours(q: Quantized, scheme: Scheme) -> dict[str, tuple[int, Call]]:
    panels, m = pack(q, scheme), len(q.codes)
    nbytes, product = panels.codes.nbytes + panels.scales.nbytes, torch.ops.llmquant.w4_linear
    return {
        f"llmquant {precision}": (nbytes, lambda x, p=planes: product(x, *panels, None, m, 4, scheme.group_size, p))
        for precision, planes in PLANES.items()
    }


def torch_dense(q: Quantized, scheme: Scheme) -> dict[str, tuple[int, Call]]:
    W = dequantize(q, scheme)
    halves = W.bfloat16()
    return {
        "torch fp32": (W.nbytes, lambda x: torch.nn.functional.linear(x, W)),
        "torch bf16": (halves.nbytes, lambda x: torch.nn.functional.linear(x.bfloat16(), halves)),
    }


def torch_int4(q: Quantized, scheme: Scheme) -> dict[str, tuple[int, Call]]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.codes.int(), 1)
    # Its zero point is real, and counted from the middle of the codes.
    grid = torch.stack((q.scales, torch.zeros_like(q.scales)), -1).transpose(0, 1).contiguous().bfloat16()
    g = scheme.group_size
    call = lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, g, grid)  # noqa: E731
    return {"torch int4pack": (packed.nbytes + grid.nbytes, call)}


def onnx_runtime(q: Quantized, scheme: Scheme) -> dict[str, tuple[int, Call]]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    m, n = q.codes.shape
    codes = (q.codes[:, 0::2] | q.codes[:, 1::2] << 4).view(m, n // scheme.group_size, -1).numpy()
    constants = [numpy_helper.from_array(codes, "B"), numpy_helper.from_array(q.scales.flatten().numpy(), "scales")]
    sizes = {"K": n, "N": m, "bits": 4, "block_size": scheme.group_size, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["A", "B", "scales"], ["Y"], domain="com.microsoft", **sizes)
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["k", width])] for name, width in (("A", n), ("Y", m))
    )
    graph = helper.make_graph([node], "product", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its idle threads would slow the others
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    nbytes = codes.nbytes + q.scales.nbytes
    return {"ONNX Runtime, accuracy 4": (nbytes, lambda x: torch.from_numpy(session.run(None, {"A": x.numpy()})[0]))}


def backends() -> list[Callable[[Quantized, Scheme], dict[str, tuple[int, Call]]]]:
    optional = [onnx_runtime] if find_spec("onnx") and find_spec("onnxruntime") else []
    return [reading, ours, torch_dense, torch_int4, *optional]


def random_weight(m: int, n: int, scheme: Scheme, seed: int) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    grid = (m, scheme.groups(n))
    codes = torch.randint(0, 16, (m, n), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(grid, generator=generator) * 0.01 + 0.001).bfloat16().float()
    return Quantized(codes, scales, torch.full(grid, 8, dtype=torch.uint8))


def reading(q: Quantized, _: Scheme) -> dict[str, tuple[int, Call]]:
    """What the memory allows: a sum of as many bytes as the codes have."""
    block = torch.ones(q.codes.numel() // 8)
    return {READING: (block.nbytes, lambda _: block.sum())}


def measure(m: int, n: int, scheme: Scheme, counts: list[int]) -> list[dict[str, Any]]:
    copies: dict[str, list[Call]] = {}
    sizes: dict[str, int] = {}
    first = random_weight(m, n, scheme, 0)
    for make in backends():
        made = make(first, scheme)
        number = max(2, -(-ROTATED // min(size for size, _ in made.values())))
        for seed in range(number):
            for name, (size, call) in (made if seed == 0 else make(random_weight(m, n, scheme, seed), scheme)).items():
                copies.setdefault(name, []).append(call)
                sizes[name] = size
    real = dequantize(first, scheme).double()
    found = []
    for count in counts:
        x = torch.randn(count, n, generator=torch.Generator().manual_seed(1))
        exact = x.double() @ real.T
        times: dict[str, list[float]] = {name: [] for name in copies}
        turns = {name: cycle(calls) for name, calls in copies.items()}
        for _ in range(TURNS):
            for name, calls in turns.items():
                if sum(times[name]) < SECONDS:
                    times[name] += timed(calls, x)
        bandwidth = sizes[READING] / statistics.median(times.pop(READING))
        for name, taken in times.items():
            error = float((copies[name][0](x).double() - exact).norm() / exact.norm())
            seconds = statistics.median(taken)
            row = {"n": n, "m": m, "tokens": count, "backend": name, "seconds": seconds, "bytes": sizes[name]}
            row |= {"bandwidth": bandwidth, "relative_error": error, "flops": 2 * m * n * count / seconds}
            found.append(row)
    return found


def timed(calls: Iterator[Call], x: Tensor) -> list[float]:
    """Seconds of a few calls. The threads of other backends have come to rest, and this one's are all running: a
    thread that was asleep may have to wait for the scheduler's next tick, 4 ms later."""
    time.sleep(PAUSE)
    began = time.perf_counter()
    next(calls)(x)
    while time.perf_counter() - began < AWAKE:
        next(calls)(x)
    seconds = []
    for _ in range(EACH_TURN):
        started = time.perf_counter()
        next(calls)(x)
        seconds.append(time.perf_counter() - started)
    return seconds


def counts(text: str) -> list[int]:
    """Positive numbers, separated by commas."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text}: give numbers like {TOKENS}")
    return [int(count) for count in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--tokens", type=counts, default=TOKENS)
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128), default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no directory {args.json.parent}")
    shapes = [tuple(map(int, shape)) for shape in re.findall(r"(?:^|,)([1-9]\d*)x([1-9]\d*)(?=,|$)", args.shapes)]
    if len(shapes) != args.shapes.count(",") + 1 or any(n % args.group_size for n, _ in shapes):
        parser.error(
            f"--shapes {args.shapes}: give columns x rows like {SHAPES}, columns in groups of {args.group_size}"
        )
    print(f"{describe_backend()}, {torch.get_num_threads()} threads")
    results = []
    with torch.inference_mode():
        for n, m in shapes:
            for row in measure(m, n, Scheme(4, args.group_size), args.tokens):
                share, rate = row["bytes"] / row["seconds"] / row["bandwidth"], row["flops"] / 1e9
                print(
                    f"{n:>6}x{m:<6} {row['tokens']:>4} tokens  {row['backend']:26}{1e3 * row['seconds']:>9.3f} ms"
                    f"{share:>7.0%} of {row['bandwidth'] / 1e9:.1f} GB/s{rate:>8.0f} GFLOP/s"
                    f"  error {row['relative_error']:.1e}",
                    flush=True,
                )
                results.append(row)
    if args.json:
        facts = {"backend": describe_backend(), "threads": torch.get_num_threads()}
        args.json.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
