"""Products with packed weights on a GPU beside their peers: weights from beyond its L2 cache, in CUDA graphs."""

import random
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmquant.bench.gpu_products import DENSE, Maker
from llmquant.bench.products import Product
from llmquant.native import describe_gpu_backend
from llmquant.scheme import Quantized, Scheme, dequantize

# In features n, out features m, of the linears of Llama 3 8B and 70B.
SHAPES = (
    *((4096, 4096), (4096, 6144), (4096, 28672), (14336, 4096)),
    *((8192, 8192), (8192, 10240), (8192, 28672), (28672, 8192)),
)
TOKENS = tuple(2**i for i in range(13))
COLDNESS = 4  # bytes of the copies of a weight, in L2 caches
LONGEST = 0.005  # seconds of one graph, about
REPLAYS, FEWEST = 25, 7
ENOUGH = 0.25  # seconds of all replays, after which there are no more than the fewest
WRONG = 0.05  # relative error of what cannot be the same product
# What a peer may raise: it has no kernel for the shape or the device, or its package is not the version known here.
UNABLE = (RuntimeError, ValueError, AssertionError, ImportError, AttributeError, TypeError)


class Result(NamedTuple):
    """One product. Seconds are those of one call, among the replays of a graph that holds all copies of the weight."""

    n: int
    m: int
    tokens: int
    backend: str
    seconds: float  # median
    fast: float  # 10th percentile
    slow: float  # 90th
    bytes: int  # of the weight
    copies: int
    relative_error: float  # from the product in float64

    @property
    def bandwidth(self) -> float:
        """Bytes per second of weight, activations and outputs, which are of 16 bits."""
        return (self.bytes + 2 * self.tokens * (self.n + self.m)) / self.seconds

    @property
    def flops(self) -> float:
        return 2 * self.n * self.m * self.tokens / self.seconds


class Refusal(NamedTuple):
    """A product that was not measured, and why."""

    n: int
    m: int
    tokens: int
    backend: str
    reason: str


def copies_for(nbytes: int, cache: int) -> int:
    """Of a weight, so that none is in a cache of so many bytes when its turn comes again; all are in one graph."""
    return max(2, -(-COLDNESS * cache // nbytes))


def measure(
    n: int, m: int, scheme: Scheme, tokens: Sequence[int], contestants: Mapping[str, Maker], dtype: torch.dtype
) -> Iterator[Result | Refusal]:
    """Every contestant on the current GPU, with so many tokens after so many."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    q = random_weight(m, n, scheme)
    real = dequantize(q, scheme)
    entrants: dict[str, list[Product]] = {}
    for name, make in contestants.items():
        try:
            products = [make(q, scheme, dtype)]
            products += [make(q, scheme, dtype) for _ in range(copies_for(products[0].nbytes, cache) - 1)]
        except UNABLE as error:
            reason = first_line(error)
            yield from (Refusal(n, m, count, name, reason) for count in tokens)
        else:
            entrants[name] = products
    for count in tokens:
        yield from race(entrants, real, count, dtype)


def race(
    entrants: Mapping[str, list[Product]], real: Tensor, count: int, dtype: torch.dtype
) -> Iterator[Result | Refusal]:
    """All with so many tokens, in turn: a GPU's clock follows the power that it has taken, and is the same for all."""
    m, n = real.shape
    x = torch.randn(count, n, device=real.device, generator=torch.Generator(real.device).manual_seed(1)).to(dtype)
    checked = slice(0, 64)  # tokens
    exact = x[checked].double() @ real.double().T
    graphs: dict[str, Graph] = {}
    errors: dict[str, float] = {}
    for name, products in entrants.items():
        try:
            errors[name] = float((products[0].call(x)[checked].double() - exact).norm() / exact.norm())
            if not errors[name] < WRONG:
                yield Refusal(n, m, count, name, f"its result is off by {errors[name]:.2g}")
                continue
            graphs[name] = Graph([product.call for product in products], x)
        except UNABLE as problem:
            yield Refusal(n, m, count, name, first_line(problem))
    for name, times in replay_in_turn(graphs).items():
        fast, median, slow = spread(times)
        yield Result(n, m, count, name, median, fast, slow, entrants[name][0].nbytes, len(entrants[name]), errors[name])


class Graph:
    """A CUDA graph of all calls, as often as makes it long enough to time.

    Attributes:
        replays: of it, that are worth timing.
    """

    def __init__(self, calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> None:
        for call in calls:
            call(x)  # compiled, tuned and in memory before the capture
        torch.cuda.synchronize()
        once = timed(lambda: [call(x) for call in calls])
        rounds = max(1, min(20, int(LONGEST / once)))
        self.replays = max(FEWEST, min(REPLAYS, int(ENOUGH / (rounds * once))))
        self._calls = rounds * len(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(rounds):
                for call in calls:
                    call(x)
        for _ in range(3):
            self._graph.replay()

    def seconds(self) -> float:
        """Of one call, in one replay."""
        return timed(self._graph.replay) / self._calls


def replay_in_turn(graphs: Mapping[str, Graph]) -> dict[str, list[float]]:
    """Seconds of one call for each replay. Each round has an order of its own, so that no graph always follows the
    same one."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    order = random.Random(0)  # noqa: S311
    while waiting := [name for name, graph in graphs.items() if len(times[name]) < graph.replays]:
        for name in order.sample(waiting, len(waiting)):
            times[name].append(graphs[name].seconds())
    return times


def graph_seconds(calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> list[float]:
    """Seconds of one call, for each replay of a graph of all calls."""
    return replay_in_turn({"": Graph(calls, x)})[""]


def timed(work: Callable[[], Any]) -> float:
    """Seconds on the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """10th percentile, median, 90th percentile."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[0], statistics.median(times), cuts[-1]


def tune_triton(n: int, m: int, scheme: Scheme, tokens: Sequence[int], dtype: torch.dtype) -> None:
    """Let the Triton kernel try its tiles on cold weights, and remember the best for this device."""
    from llmquant.kernels import triton, tuning

    device = torch.device("cuda")
    q, cache = random_weight(m, n, scheme), torch.cuda.get_device_properties().L2_cache_size
    first = triton.pack(q, scheme)
    held = [first, *(triton.pack(q, scheme) for _ in range(copies_for(first.codes.nbytes, cache) - 1))]

    def seconds(x: Tensor, config: tuning.Config) -> float:
        calls = [partial(triton.linear, packed=packed, bias=None, m=m, scheme=scheme, config=config) for packed in held]
        try:
            return spread(graph_seconds(calls, x))[1]
        except RuntimeError:  # more registers or shared memory than there are
            return float("inf")

    for count in (count for count in tokens if count <= tuning.most_tokens(device)):
        key = tuning.key(m, n, count, triton.step_of(scheme))
        x = torch.randn(count, n, device=device).to(dtype)
        tuning.tune(device, key, partial(seconds, x), tuning.candidates(count))


def limits(dtype: torch.dtype) -> dict[str, float]:
    """What the device reaches in this run: bytes per second of reading memory, operations per second of cuBLAS."""
    block = torch.ones(1 << 28, device="cuda")
    square = torch.randn(8192, 8192, device="cuda").to(dtype)
    reading = spread(graph_seconds([lambda _: block.sum()] * 2, block))[1]
    product = spread(graph_seconds([lambda x: x @ x] * 2, square))[1]
    return {"read_bandwidth": block.nbytes / reading, "peak_flops": 2 * 8192**3 / product}


def machine() -> dict[str, Any]:
    """What a figure has to be read with."""
    device = torch.cuda.get_device_properties()
    query = "driver_version,clocks.sm,clocks.mem,power.limit"
    try:
        told = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", str(torch.cuda.current_device())]
        smi = subprocess.run(told, capture_output=True, text=True, check=True, timeout=30).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        smi = f"nvidia-smi: {first_line(error)}"
    return {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        query: smi,
        "backend": describe_gpu_backend(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def random_weight(m: int, n: int, scheme: Scheme) -> Quantized:
    """Symmetric, of 4 bits, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    grid = (m, scheme.groups(n))
    codes = torch.randint(0, 16, (m, n), dtype=torch.uint8, device="cuda", generator=generator)
    scales = (torch.rand(grid, device="cuda", generator=generator) * 0.01 + 0.001).bfloat16().float()
    return Quantized(codes, scales, torch.full(grid, 8, dtype=torch.uint8, device="cuda"))


def table(results: Sequence[Result], limits: Mapping[str, float]) -> list[str]:
    """A line for each product of ours: time, shares of the limits, and how often faster than each peer."""
    lines = []
    for own in results:
        if not own.backend.startswith("llmquant"):
            continue
        peers = {r.backend: r.seconds for r in results if r[:3] == own[:3] and not r.backend.startswith("llmquant")}
        times = ", ".join(f"{seconds / own.seconds:.2f}x {name}" for name, seconds in peers.items())
        lines.append(
            f"{own.n:>6}x{own.m:<6}{own.tokens:>5} tokens  {own.backend:16}{1e6 * own.seconds:>9.1f} us "
            f"({1e6 * own.fast:.1f} to {1e6 * own.slow:.1f})"
            f"{own.bandwidth / limits['read_bandwidth']:>6.0%} of reading"
            f"{own.flops / limits['peak_flops']:>6.0%} of peak  {times}"
        )
    return lines


def fastest(results: Sequence[Result]) -> list[str]:
    """A line for each shape and number of tokens that several of our kernels were measured with, fastest first."""
    lines = []
    for n, m, tokens in dict.fromkeys(result[:3] for result in results):
        ours = [r for r in results if r[:3] == (n, m, tokens) and r.backend.startswith("llmquant ")]
        if len(ours) > 1:
            order = sorted(ours, key=lambda r: r.seconds)
            times = ", ".join(f"{r.backend.removeprefix('llmquant ')} {1e6 * r.seconds:.1f} us" for r in order)
            lines.append(f"{n:>6}x{m:<6}{tokens:>5} tokens  {times}")
    return lines


def speedups(results: Sequence[Result], n: int, m: int) -> dict[str, list[tuple[int, float]]]:
    """By backend, over cuBLAS: (tokens, times as fast)."""
    here = [result for result in results if (result.n, result.m) == (n, m)]
    dense = {result.tokens: result.seconds for result in here if result.backend == DENSE}
    found: dict[str, list[tuple[int, float]]] = {}
    for result in here:
        if result.tokens in dense:
            found.setdefault(result.backend, []).append((result.tokens, dense[result.tokens] / result.seconds))
    return found


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
