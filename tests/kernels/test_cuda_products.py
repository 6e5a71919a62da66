"""The CUDA products on the emulated device, against the definition in float64."""

import itertools

import pytest
import torch
from emulated_cuda import BOXES, CLUSTER, GEMM, GEMV, PAIRS, SPLIT, WGMMA, Emulator, random_weight
from torch import Tensor

from llmquant.scheme import Quantized, Scheme, dequantize

SCHEMES = [Scheme(4, g, sym) for g in (32, 64, 128, -1) for sym in (True, False)]
DTYPES = [torch.bfloat16, torch.float16]
FEW = {"gemv": GEMV, "cluster": CLUSTER, "gemm": GEMM, "wgmma": WGMMA, "split": SPLIT}  # paths for few tokens
PATHS = FEW | {"pairs": PAIRS, "boxes": BOXES}
# One product in bf16 or fp16 of weights in that dtype is off by half a unit in the last place of y, and of each weight
# in gemm: relative to the size of what is summed.
ERRORS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def expected(x: Tensor, q: Quantized, scheme: Scheme, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ dequantize(q, scheme).double().T
    return y if bias is None else y + bias.double()


def assert_close(y: Tensor, x: Tensor, q: Quantized, scheme: Scheme, bias: Tensor | None = None) -> None:
    size = (x.double().abs() @ dequantize(q, scheme).double().abs().T).sqrt()  # no cancellation
    wanted = expected(x, q, scheme, bias)
    scale = wanted.abs() + size * dequantize(q, scheme).double().abs().max().sqrt() * x.double().abs().max().sqrt()
    assert torch.isfinite(y).all()
    assert float(((y.double() - wanted).abs() / scale).max()) < 2 * ERRORS[x.dtype]


def random_x(tokens: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES[::3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("path", "tokens"),
    [
        ("gemv", 1),
        ("gemv", 5),
        ("gemv", 8),
        ("cluster", 5),
        ("gemm", 9),
        ("gemm", 20),
        ("gemm", 33),
        ("gemm", 65),
    ]
    + [(path, tokens) for path in ("wgmma", "split") for tokens in (3, 9, 20, 33, 65, 130)]
    + [("pairs", tokens) for tokens in (65, 130)]
    + [("boxes", 130)],
)
def test_integers_are_exact(emulator: Emulator, path: str, tokens: int, dtype: torch.dtype, scheme: Scheme) -> None:
    """Scales of one, and activations that are small integers: every sum is exact in fp32, so bits have to agree."""
    emulator.emulate(3)
    q = random_weight(scheme, 128, 320)
    q = Quantized(q.codes, torch.ones_like(q.scales), q.zeros)
    x = (torch.arange(tokens * 320).view(tokens, 320) * 7 % 5 - 2).to(dtype)
    y = emulator.linear(x, emulator.pack(q, scheme, dtype), path=PATHS[path])
    assert torch.equal(y, expected(x, q, scheme).to(dtype))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(
    ("path", "tokens"), [*((path, 3) for path in FEW), ("wgmma", 20), ("pairs", 65), ("boxes", 130)]
)
def test_scales_of_any_size(emulator: Emulator, path: str, tokens: int, group: int, symmetric: bool) -> None:
    """Powers of two from 2^-96 to 2^15, and all sums of a row exact: from what bf16 makes of tiny numbers, no bit is
    lost."""
    scheme = Scheme(4, group, symmetric)
    q = random_weight(scheme, 112, 256)
    q = Quantized(q.codes, 2.0 ** torch.arange(-96, 16)[:, None].expand_as(q.scales), q.zeros)
    x = (torch.arange(tokens * 256).view(tokens, 256) * 7 % 5 - 2).bfloat16()
    y = emulator.linear(x, emulator.pack(q, scheme, x.dtype), path=PATHS[path])
    assert torch.equal(y, expected(x, q, scheme).bfloat16())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(
    ("path", "tokens"),
    [("gemv", 1), ("gemv", 3), ("cluster", 3), ("gemm", 2), ("gemm", 30), ("gemm", 64), ("gemm", 70)]
    + [("wgmma", tokens) for tokens in (1, 16, 30, 64, 70)]
    + [("split", tokens) for tokens in (1, 16, 64, 70)]
    + [("pairs", 70), ("boxes", 70), ("boxes", 130)],
)
def test_odd_shapes(emulator: Emulator, path: str, tokens: int, scheme: Scheme) -> None:
    for (m, n), dtype in zip(
        [(1, 1), (77, 129), (200, 200), (300, 1100)][: 4 if tokens < 64 else 3], itertools.cycle(DTYPES), strict=False
    ):
        emulator.emulate(2)
        q, x = random_weight(scheme, m, n), random_x(tokens, n, dtype)
        bias = torch.randn(m).to(DTYPES[m % 2])
        y = emulator.linear(x, emulator.pack(q, scheme, dtype), bias, PATHS[path])
        assert_close(y, x, q, scheme, bias)


@pytest.mark.parametrize("late", [False, True], ids=["early copies", "late copies"])
@pytest.mark.parametrize(
    ("path", "tokens"),
    [("gemv", 2), ("gemm", 16), ("gemm", 32), ("gemm", 64), ("gemm", 140)]
    + [("wgmma", tokens) for tokens in (2, 16, 32, 64, 70, 140)]
    + [("pairs", tokens) for tokens in (70, 140)]
    + [("boxes", 140)],
)
@pytest.mark.parametrize("group", [32, 128])
def test_no_order_of_threads_matters(emulator: Emulator, path: str, tokens: int, group: int, late: bool) -> None:
    scheme = Scheme(4, group, symmetric=False)
    # The long ones go around in every ring of stages.
    shapes = {(256, 640): 1, (256, 256): 7, (640, 128): 1, (128, 640): 1, (128, 2100): 1}
    for (m, n), processors in shapes.items():
        if tokens > 64 and m * n > 100_000:
            continue  # for time's sake
        q, x = random_weight(scheme, m, n), random_x(tokens, n, torch.bfloat16)
        packed = emulator.pack(q, scheme, x.dtype)
        results = []
        for seed in range(3):
            emulator.emulate(processors, seed=seed, late=late)
            results.append(emulator.linear(x, packed, path=PATHS[path], runs=2 if tokens < 64 else 1))
        assert_close(results[0], x, q, scheme)
        assert all(torch.equal(results[0], y) for y in results)


@pytest.mark.parametrize("late", [False, True], ids=["early copies", "late copies"])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(
    ("m", "n", "processors", "blocks"), [(300, 1000, 2, 1), (200, 1100, 2, 2), (128, 1100, 2, 4), (100, 2100, 4, 8)]
)
def test_a_cluster_adds_up_a_tile(
    emulator: Emulator, m: int, n: int, processors: int, blocks: int, tokens: int, late: bool
) -> None:
    tiles, chunks = -(-m // 128), -(-n // 128) * 2
    assert blocks * tiles <= 2 * processors
    assert 4 * blocks <= chunks
    assert 2 * blocks * tiles > 2 * processors or blocks == 8, "it would be twice as many"
    scheme = Scheme(4, 64, symmetric=False)
    q, x = random_weight(scheme, m, n), random_x(tokens, n, torch.bfloat16)
    bias, packed = torch.randn(m), emulator.pack(q, scheme, x.dtype)
    results = []
    for seed in range(4):
        emulator.emulate(processors, seed=seed, late=late)
        results.append(emulator.linear(x, packed, bias, CLUSTER, runs=2))
    assert_close(results[0], x, q, scheme, bias)
    assert all(torch.equal(results[0], y) for y in results)


@pytest.mark.parametrize("late", [False, True], ids=["early copies", "late copies"])
@pytest.mark.parametrize(
    ("m", "n", "tokens", "processors", "blocks"),
    [
        (300, 500, 6, 2, 2),
        (200, 2100, 14, 4, 8),  # of a thread there are fewer sums than blocks
        (250, 1000, 33, 4, 4),
        (256, 700, 70, 2, 2),
        (300, 300, 140, 3, 1),
        (120, 2100, 140, 8, 8),
    ],
)
def test_a_tile_is_split_by_columns(
    emulator: Emulator, m: int, n: int, tokens: int, processors: int, blocks: int, late: bool
) -> None:
    tiles, chunks, workers = -(-m // (256 if tokens <= 128 else 128)), -(-n // 128), processors
    workers *= 2 if tokens <= 16 else 1
    assert blocks * tiles <= workers
    assert 2 * blocks <= chunks
    assert 2 * blocks * tiles > workers or 4 * blocks > chunks or blocks == 8, "it would be twice as many"
    scheme = Scheme(4, 32 if tokens == 14 else 128, symmetric=False)
    q, x = random_weight(scheme, m, n), random_x(tokens, n, torch.bfloat16)
    bias, packed = torch.randn(m), emulator.pack(q, scheme, x.dtype)
    results = []
    for seed in range(3):
        emulator.emulate(processors, seed=seed, late=late)
        results.append(emulator.linear(x, packed, bias, SPLIT, runs=2 if tokens <= 64 else 1))
    assert_close(results[0], x, q, scheme, bias)
    assert all(torch.equal(results[0], y) for y in results)


@pytest.mark.parametrize("late", [False, True], ids=["early copies", "late copies"])
@pytest.mark.parametrize(
    ("m", "n", "tokens", "processors"),
    [
        (696, 500, 140, 2),  # three tiles of the only pair, one after the other; of the last, the second block has none
        (520, 260, 500, 2),  # each tile has as many chunks as there are stages
        (256, 120, 700, 2),  # one
        (264, 4700, 140, 6),  # two tiles for three pairs: one ends the first and begins the second
        (776, 380, 140, 6),  # four tiles for three pairs, which share the last
    ],
)
def test_results_leave_while_the_next_tile_begins(
    emulator: Emulator, m: int, n: int, tokens: int, processors: int, late: bool
) -> None:
    scheme = Scheme(4, 32, symmetric=False)
    q, x = random_weight(scheme, m, n), random_x(tokens, n, torch.bfloat16)
    bias, packed = torch.randn(m), emulator.pack(q, scheme, x.dtype)
    emulator.emulate(processors)
    wanted = emulator.linear(x, packed, bias, PAIRS)
    assert_close(wanted, x, q, scheme, bias)
    emulator.functions.llmquant_emulated_conflicts()
    for seed in range(3):
        emulator.emulate(processors, seed=seed, late=late)
        assert torch.equal(emulator.linear(x, packed, bias, BOXES), wanted)
    assert emulator.functions.llmquant_emulated_conflicts() == 1


@pytest.mark.parametrize("path", FEW)
def test_every_weight_is_read_back(emulator: Emulator, path: str) -> None:
    """A column of the identity at a time: 8 of them are a product of 8 tokens."""
    scheme = Scheme(4, 64, symmetric=False)
    emulator.emulate(2)
    q = random_weight(scheme, 70, 136)
    packed = emulator.pack(q, scheme, torch.float16)
    parts = [emulator.linear(x, packed, path=PATHS[path]) for x in torch.eye(136, dtype=torch.float16).split(8)]
    assert torch.equal(torch.cat(parts), dequantize(q, scheme).T.half())


def test_matrices_are_read_without_conflicts(emulator: Emulator) -> None:
    emulator.functions.llmquant_emulated_conflicts()
    scheme = Scheme(4, 128)
    q = random_weight(scheme, 128, 256)
    packed = emulator.pack(q, scheme, torch.float16)
    for path in FEW.values():
        emulator.linear(random_x(8, 256, torch.float16), packed, path=path)
    assert emulator.functions.llmquant_emulated_conflicts() == 1


def test_infinities_and_nans_stay_in_their_token(emulator: Emulator) -> None:
    scheme = Scheme(4, 128)
    q, x = random_weight(scheme, 128, 128), random_x(4, 128, torch.float16)
    x[1, 5], x[2, 7] = torch.inf, torch.nan
    for path in FEW.values():
        y = emulator.linear(x, emulator.pack(q, scheme, x.dtype), path=path)
        assert torch.isfinite(y[[0, 3]]).all()
        assert not torch.isfinite(y[[1, 2]]).any()
