"""Products with packed weights beside their peers, weights from beyond the caches."""

import re
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmquant.bench.products import READING, Product, makers
from llmquant.bench.timing import Call, in_turn
from llmquant.native import describe_backend
from llmquant.scheme import Quantized, Scheme, dequantize

SHAPES = ((4096, 4096), (2048, 8192), (4096, 14336), (14336, 4096))  # in features n, out features m
TOKENS = (1, 4, 16, 128, 512)
ROTATED = 192 * 2**20  # bytes of weights, and at least two


class Result(NamedTuple):
    """One product: medians, rates, and the bandwidth that reading as many bytes reached in its turn."""

    n: int
    m: int
    tokens: int
    backend: str
    seconds: float
    bytes: int  # of the weight
    bandwidth: float  # bytes per second
    relative_error: float  # from the product in float64
    flops: float  # operations per second

    @property
    def of_bandwidth(self) -> float:
        """The share of the bandwidth at which the weight was read."""
        return self.bytes / self.seconds / self.bandwidth


def measure(n: int, m: int, scheme: Scheme, tokens: Sequence[int]) -> Iterator[Result]:
    """Every backend with so many tokens. Each call takes the next of so many copies of the weight that none is in a
    cache when its turn comes."""
    copies: dict[str, list[Product]] = {}
    for make in makers():
        made = make(random_weight(m, n, scheme, 0), scheme)
        number = max(2, -(-ROTATED // min(product.nbytes for product in made.values())))
        for seed in range(number):
            for name, product in (made if seed == 0 else make(random_weight(m, n, scheme, seed), scheme)).items():
                copies.setdefault(name, []).append(product)
    real = dequantize(random_weight(m, n, scheme, 0), scheme).double()
    for count in tokens:
        x = torch.randn(count, n, generator=torch.Generator().manual_seed(1))
        exact = x.double() @ real.T
        times = in_turn({name: _calls(products, x) for name, products in copies.items()})
        bandwidth = copies[READING][0].nbytes / statistics.median(times.pop(READING))
        for name, taken in times.items():
            product, seconds = copies[name][0], statistics.median(taken)
            error = float((product.call(x).double() - exact).norm() / exact.norm())
            flops = 2 * m * n * count / seconds
            yield Result(n, m, count, name, seconds, product.nbytes, bandwidth, error, flops)


def _calls(products: list[Product], x: Tensor) -> Iterator[Call]:
    return (partial(product.call, x) for product in cycle(products))


def parse_shape(text: str, group_size: int) -> tuple[int, int]:
    """In and out features. Raises ValueError, which says how to write them."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found or int(found[1]) % group_size:
        raise ValueError(f"{text}: give in x out features, as in 4096x14336, in groups of {group_size}")
    return int(found[1]), int(found[2])


def machine() -> dict[str, Any]:
    return {"backend": describe_backend(), "torch": torch.__version__, "threads": torch.get_num_threads()}


def random_weight(m: int, n: int, scheme: Scheme, seed: int) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    grid = (m, scheme.groups(n))
    codes = torch.randint(0, 16, (m, n), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(grid, generator=generator) * 0.01 + 0.001).bfloat16().float()
    return Quantized(codes, scales, torch.full(grid, 8, dtype=torch.uint8))


def facts(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [result._asdict() for result in results]
