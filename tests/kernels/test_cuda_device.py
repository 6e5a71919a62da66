"""The products of every GPU backend, on the device itself.

Without one, Triton's kernels are run by its interpreter, and those of csrc/cuda are compiled for the CPU.
"""

import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType

import pytest
import torch
from kernel_cases import Weight, relative_error
from kernel_cases import weight as make
from torch import Tensor, nn
from triton_cases import DEVICE

from llmquant import native
from llmquant.kernels import backends, cuda, ops
from llmquant.kernels.backends import PANELS, kernels_for
from llmquant.kernels.layout import Packed
from llmquant.native import CUDA_BINDING, CUDA_LIBRARY
from llmquant.runtime.linear import QuantLinear
from llmquant.scheme import Scheme

NEEDS_GPU = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
GROUPS = (32, 64, 128, -1) if DEVICE == "cuda" else (64,)  # the interpreter sees all of them in test_triton_linear.py
SCHEMES = [Scheme(4, g, symmetric) for g in GROUPS for symmetric in (True, False)]
BOUND = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative, of the output's rounding and the sums'
TOKENS = (1, 3, 8, 9, 16, 17, 64, 65, 300, 700) if DEVICE == "cuda" else (1, 17, 300)  # on both sides of every path
weight = cache(make)


@pytest.fixture(params=native.GPU_BACKENDS)
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    """`llmquant.kernels.cuda` or `llmquant.kernels.triton`."""
    if request.param == "triton":
        return pytest.importorskip("llmquant.kernels.triton", reason="needs Triton", exc_type=ImportError)
    if DEVICE != "cuda":
        request.getfixturevalue("emulated_library")
    elif not CUDA_LIBRARY.is_file():
        pytest.skip(f"{CUDA_LIBRARY.name} was not built")
    return cuda


def packed(kernels: ModuleType, w: Weight) -> Packed:
    return kernels.pack(w.q._replace(**{name: part.to(DEVICE) for name, part in w.q._asdict().items()}), w.scheme)


def rows(tokens: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products(scheme: Scheme, dtype: torch.dtype, kernels: ModuleType) -> None:
    m, n = 200, 328
    w, bias = weight(scheme, m, n), torch.linspace(-1, 1, m).to(dtype)
    held = packed(kernels, w)
    for tokens in TOKENS:
        x = rows(tokens, n, dtype)
        y = kernels.linear(x.to(DEVICE), held, bias.to(DEVICE), m, scheme)
        assert relative_error(y.cpu(), x.double() @ w.real.T + bias.double()) < BOUND[dtype], tokens


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("path", "counts", "devices"),
    [
        (cuda.GEMV, (1, 8), range(80, 999)),
        (cuda.CLUSTER, (1, 8), range(90, 999)),
        (cuda.WGMMA, (16, 300) if DEVICE == "cuda" else (70,), range(90, 91)),
        (cuda.PAIRS, (300, 700) if DEVICE == "cuda" else (70,), range(90, 91)),
        (cuda.BOXES, (500, 2000) if DEVICE == "cuda" else (140,), range(90, 91)),
        (cuda.SPLIT, (1, 16, 64, 200) if DEVICE == "cuda" else (1, 70), range(90, 91)),
    ],
    ids=["gemv", "cluster", "wgmma", "pairs", "boxes", "split"],
)
# With 3104 rows every block uses its ring of stages again, and with 2000 tokens has a second tile.
@pytest.mark.parametrize(
    ("m", "n"), [(3104, 4000), (200, 4096), (1000, 1000), (200, 200)] if DEVICE == "cuda" else [(104, 600)]
)
def test_products_in_clusters(
    m: int, n: int, path: int, counts: tuple[int, ...], devices: range, dtype: torch.dtype, kernels: ModuleType
) -> None:
    """By name: which of them the table chooses depends on the shape."""
    if kernels is not cuda:
        pytest.skip("Triton has no clusters")
    if DEVICE == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if 10 * major + minor not in devices:
            pytest.skip(f"needs a CUDA GPU of sm_{devices[0]}{' and newer' if len(devices) > 1 else ''}")
    scheme = Scheme(4, 64)
    w, bias = weight(scheme, m, n), torch.linspace(-1, 1, m).to(dtype)
    held = packed(kernels, w)
    for tokens in counts:
        x = rows(tokens, n, dtype)
        multiply = lambda: cuda.linear(x.to(DEVICE), held, bias.to(DEVICE), m, scheme, path)  # noqa: B023, E731
        y = multiply()
        assert relative_error(y.cpu(), x.double() @ w.real.T + bias.double()) < BOUND[dtype]
        # The other shape is what compute-sanitizer sees, which is slow.
        assert all(torch.equal(multiply(), y) for _ in range(100 if n == 1000 else 1))


@NEEDS_GPU
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("m", "n"), [(4096, 4096), (4096, 14336), (8192, 32)])
def test_the_error_is_no_larger_than_that_of_dequantizing(
    m: int, n: int, dtype: torch.dtype, kernels: ModuleType
) -> None:
    scheme, generator = Scheme(4, 32), torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (m, n), dtype=torch.uint8, generator=generator).cuda()
    scales = (torch.rand(m, n // 32, generator=generator) + 0.5).bfloat16().float().cuda()
    q = weight(scheme, 1, 32).q._replace(codes=codes, scales=scales, zeros=torch.full_like(scales, 8).byte())
    real = (codes.double() - 8) * scales.double().repeat_interleave(32, 1)
    held = kernels.pack(q, scheme)
    for tokens in (1, 16, 64, 200, 600):
        x = rows(tokens, n, dtype).cuda()
        exact = x.double() @ real.T
        error = relative_error(kernels.linear(x, held, None, m, scheme), exact)
        assert error <= 1.1 * relative_error(x @ real.to(dtype).T, exact), tokens


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(4, -1, symmetric=False)], ids=str)
def test_whole_numbers_are_exact(scheme: Scheme, kernels: ModuleType) -> None:
    """Every product and every sum fits fp32 and the output: any order of them gives the same bits."""
    m, n = 70, 328
    w = weight(scheme, m, n)
    steps = w._replace(q=w.q._replace(scales=torch.full_like(w.q.scales, 0.25)))
    real = 0.25 * (w.q.codes.double() - w.q.zeros.double().repeat_interleave(scheme.width(n), 1)[:, :n])
    held = packed(kernels, steps)
    for tokens in TOKENS:
        x = torch.zeros(tokens, n, dtype=torch.float16)
        x[:, torch.randint(n, (20,), generator=torch.Generator().manual_seed(0))] = 4.0
        y = kernels.linear(x.to(DEVICE), held, None, m, scheme)
        assert torch.equal(y.cpu().double(), x.double() @ real.T), tokens


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_one_activation_reads_one_column(scheme: Scheme, kernels: ModuleType) -> None:
    m, n = 70, 96
    w = weight(scheme, m, n)
    held, eye = packed(kernels, w), torch.eye(n, dtype=torch.float16, device=DEVICE)
    for count in (1, 8, 16, 96) if DEVICE == "cuda" else (48,):  # tokens at a time, for every path
        y = torch.cat([kernels.linear(part, held, None, m, scheme) for part in eye.split(count)])
        assert torch.equal(y.cpu().double(), w.real.T), count


def test_wrong_scales_would_be_noticed(kernels: ModuleType) -> None:
    """The bound is tight enough for that: each row with the scales of its neighbour."""
    w = weight(Scheme(4, 32), 64, 128)
    shifted = w._replace(q=w.q._replace(scales=w.q.scales.roll(1, 0)))
    x = rows(4, 128, torch.bfloat16)
    y = kernels.linear(x.to(DEVICE), packed(kernels, shifted), None, 64, w.scheme)
    assert relative_error(y.cpu(), x.double() @ w.real.T) > 10 * BOUND[torch.bfloat16]


@pytest.mark.parametrize("tokens", TOKENS)
def test_what_lies_around_the_operands_is_not_seen(tokens: int, kernels: ModuleType) -> None:
    m, n = 70, 328
    w, x = weight(Scheme(4, 32, symmetric=False), m, n), rows(tokens, n, torch.float16).to(DEVICE)
    held = packed(kernels, w)
    expected = kernels.linear(x, held, None, m, w.scheme)
    around = [amid(part) for part in (x, *held)]
    y = kernels.linear(around[0][1], Packed(*(inner for _, inner in around[1:])), None, m, w.scheme)
    assert torch.equal(y, expected)
    for outer, inner in around:
        assert int((outer.view(torch.uint8) == 0xFF).sum()) >= outer.nbytes - inner.nbytes


def amid(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy in the middle of bytes of 0xFF, which are NaN in every dtype: the whole, and the copy."""
    room = torch.full((tensor.nbytes + 512,), 0xFF, dtype=torch.uint8, device=DEVICE)
    inner = room[256 : 256 + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    inner.copy_(tensor)
    return room, inner


def test_tokens_do_not_see_each_other(kernels: ModuleType) -> None:
    m, n = 70, 328
    held = packed(kernels, weight(Scheme(4, 32), m, n))
    for tokens in TOKENS[1:] if DEVICE == "cuda" else (17,):  # torch's product on the CPU lets NaN into other rows
        x = rows(tokens, n, torch.bfloat16).to(DEVICE)
        before = kernels.linear(x, held, None, m, Scheme(4, 32))
        x[1] = float("nan")
        after = kernels.linear(x, held, None, m, Scheme(4, 32))
        others = [i for i in range(tokens) if i != 1]
        assert torch.equal(after[others], before[others]), tokens
        assert after[1].isnan().all(), tokens


@pytest.mark.parametrize("tokens", TOKENS)
def test_every_run_gives_the_same_bits(tokens: int, kernels: ModuleType) -> None:
    """Whatever memory held before."""
    m, n = 100, 500
    held, x = packed(kernels, weight(Scheme(4, 32), m, n)), rows(tokens, n, torch.bfloat16).to(DEVICE)
    first = kernels.linear(x, held, None, m, Scheme(4, 32))
    for _ in range(100 if DEVICE == "cuda" else 1):
        spoiled = torch.full((1 << 20,), float("nan"), device=DEVICE)
        del spoiled  # the next product may get its memory
        assert torch.equal(kernels.linear(x, held, None, m, Scheme(4, 32)), first)


@NEEDS_GPU
def test_two_streams_at_once(kernels: ModuleType) -> None:
    m, n = 4096, 4096
    q = weight(Scheme(4, 32), 1, n).q
    scales, zeros = (part.cuda().expand(m, -1).contiguous() for part in (q.scales, q.zeros))
    codes = torch.randint(0, 16, (m, n), dtype=torch.uint8, device="cuda")
    held = kernels.pack(q._replace(codes=codes, scales=scales, zeros=zeros), Scheme(4, 32))
    streams = [torch.cuda.Stream() for _ in range(2)]
    xs = [rows(tokens, n, torch.bfloat16).cuda() for tokens in (2, 40)]
    expected = [kernels.linear(x, held, None, m, Scheme(4, 32)) for x in xs]
    torch.cuda.synchronize()
    outs: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for x, stream, ys in zip(xs, streams, outs, strict=True):
            with torch.cuda.stream(stream):
                ys.append(kernels.linear(x, held, None, m, Scheme(4, 32)))
    torch.cuda.synchronize()
    for ys, y in zip(outs, expected, strict=True):
        assert all(torch.equal(y, other) for other in ys)


@NEEDS_GPU
@pytest.mark.parametrize("tokens", [1, 16, 100, 1000])
def test_a_graph_gives_what_its_inputs_ask_for(tokens: int, kernels: ModuleType) -> None:
    m, n = 1000, 2048
    held, x = packed(kernels, weight(Scheme(4, 128), m, n)), rows(tokens, n, torch.bfloat16).cuda()
    kernels.linear(x, held, None, m, Scheme(4, 128))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = kernels.linear(x, held, None, m, Scheme(4, 128))
        second = kernels.linear(first[:, :64].repeat(1, n // 64), held, None, m, Scheme(4, 128))
    for seed in range(5):
        x.copy_(rows(tokens, n, torch.bfloat16).roll(seed, 1))
        graph.replay()
        expected = kernels.linear(x, held, None, m, Scheme(4, 128))
        assert torch.equal(first, expected)
        assert torch.equal(second, kernels.linear(expected[:, :64].repeat(1, n // 64), held, None, m, Scheme(4, 128)))


@NEEDS_GPU
def test_more_activations_than_32_bits_count(kernels: ModuleType) -> None:
    m, n, tokens = 64, 4096, (1 << 19) + 100
    held, x = packed(kernels, weight(Scheme(4, 128), m, n)), torch.zeros(tokens, n, dtype=torch.bfloat16, device="cuda")
    x[-100:] = rows(100, n, torch.bfloat16).cuda()
    y = kernels.linear(x, held, None, m, Scheme(4, 128))
    assert relative_error(y[-100:], x[-100:].double() @ weight(Scheme(4, 128), m, n).real.T.cuda()) < 8e-3
    assert not y[:-100].any()


# ---- the operator and the layer


@pytest.fixture(params=("cuda", "triton", "reference"))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Chosen by the environment, as a user does it."""
    if DEVICE != "cuda":
        pytest.skip("needs a CUDA GPU")
    if request.param == "cuda" and not CUDA_LIBRARY.is_file():
        pytest.skip(f"{CUDA_LIBRARY.name} was not built")
    cached: tuple[Callable[[], None], ...] = (native.find_gpu_backend.cache_clear, backends.kernels_for.cache_clear)
    monkeypatch.setenv(native.VARIABLE, request.param)
    for clear in (*cached, withdraw):
        clear()
    yield request.param
    monkeypatch.undo()
    for clear in (*cached, withdraw):
        clear()


def withdraw() -> None:
    """Torch calls the CUDA library itself no longer, until that is chosen again: a user's process chooses once."""
    if CUDA_BINDING.is_file():
        ctypes.CDLL(str(CUDA_BINDING)).llmquant_torch_cuda_serve(None, None)


def called_by_torch() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("llmquant::w4_linear", "CUDA")


@pytest.mark.parametrize("scheme", [Scheme(4, 32, symmetric=False), Scheme(4, 128), Scheme(8, 32)], ids=str)
def test_a_layer_moves_to_the_gpu_and_back(scheme: Scheme, backend: str) -> None:
    w = weight(scheme, 70, 320)
    linear = QuantLinear.from_quantized(w.q, scheme, nn.Parameter(torch.ones(70), requires_grad=False))
    before = linear.state_dict()
    linear.cuda()
    assert (kernels_for("cuda", scheme.bits) == PANELS) == (backend == "reference")
    assert called_by_torch() == (backend == "cuda" and CUDA_BINDING.is_file())
    x = rows(5, 320, torch.bfloat16)
    linear.bfloat16()
    assert relative_error(linear(x.cuda()).cpu(), x.double() @ w.real.T + 1) < 8e-3
    there = linear.float().state_dict()
    linear.load_state_dict(there)
    after = linear.cpu().state_dict()
    for name, tensor in before.items():
        assert torch.equal(there[name].cpu(), tensor)
        assert torch.equal(after[name], tensor)


def test_torch_accepts_the_operator(backend: str) -> None:
    w = weight(Scheme(4, 32, symmetric=False), 70, 320)
    linear = QuantLinear.from_quantized(w.q, w.scheme).cuda()
    x = rows(3, 320, torch.bfloat16).cuda()
    operands = (x, *linear.packed, None, 70, 4, 32, 2)
    torch.library.opcheck(torch.ops.llmquant.w4_linear.default, operands)
    compiled = torch.compile(linear, fullgraph=True)
    assert torch.equal(compiled(x), linear(x))
    with pytest.raises(RuntimeError, match=r"w4_linear: codes is .*, on cpu; expected"):
        torch.ops.llmquant.w4_linear(x, linear.codes.cpu(), *operands[2:])


# ---- the operator without Python


@pytest.fixture
def handed_over(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What torch did not give to the CUDA library itself."""
    if not CUDA_BINDING.is_file():
        pytest.skip(f"{CUDA_BINDING.name} was not built")
    assert native.describe_gpu_backend() == "cuda (LLMQUANT_BACKEND asks for it, called by torch itself)"
    seen: list[Tensor] = []
    multiply = ops._w4_linear
    monkeypatch.setattr(ops, "_w4_linear", lambda x, *rest: seen.append(x) or multiply(x, *rest))
    return seen


def product(x: Tensor, held: Packed, bias: Tensor | None, m: int, scheme: Scheme) -> Tensor:
    return torch.ops.llmquant.w4_linear(x, *held, bias, m, scheme.bits, scheme.group_size, 2)


def ordinary(w: Weight, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """With scales of the dtype of x."""
    held = packed(cuda, w)
    return held._replace(scales=held.scales.to(dtype))


FEW = (1, 3, 8, 9, 17, 65, 200)  # of which no table makes slabs
ON_CUDA = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


@ON_CUDA
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_torch_calls_the_library_itself(scheme: Scheme, dtype: torch.dtype, handed_over: list[Tensor]) -> None:
    m, n = 200, 328
    held = ordinary(weight(scheme, m, n), dtype)
    for tokens in FEW:
        x = rows(tokens, n, dtype).cuda()
        for bias in (None, torch.linspace(-1, 1, m, device="cuda"), torch.linspace(-1, 1, m, device="cuda").to(dtype)):
            assert torch.equal(product(x, held, bias, m, scheme), cuda.linear(x, held, bias, m, scheme)), tokens
    assert not handed_over


@ON_CUDA
def test_torch_calls_it_on_two_streams_at_once(handed_over: list[Tensor]) -> None:
    m, n, scheme = 1000, 2048, Scheme(4, 128)
    held = ordinary(weight(scheme, m, n))
    xs = [rows(tokens, n, torch.bfloat16).cuda() for tokens in (2, 40)]
    expected = [cuda.linear(x, held, None, m, scheme) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    outs: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for x, stream, ys in zip(xs, streams, outs, strict=True):
            with torch.cuda.stream(stream):
                ys.append(product(x, held, None, m, scheme))
    torch.cuda.synchronize()
    for ys, y in zip(outs, expected, strict=True):
        assert all(torch.equal(y, other) for other in ys)
    assert not handed_over


@ON_CUDA
@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_products_in_graphs_are_handed_over(tokens: int, handed_over: list[Tensor]) -> None:
    m, n, scheme = 1000, 2048, Scheme(4, 128)
    held, x = ordinary(weight(scheme, m, n)), rows(tokens, n, torch.bfloat16).cuda()
    product(x, held, None, m, scheme)
    torch.cuda.synchronize()
    assert not handed_over
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(x, held, None, m, scheme)
    assert len(handed_over) == 1
    for seed in range(5):
        x.copy_(rows(tokens, n, torch.bfloat16).roll(seed, 1))
        graph.replay()
        assert torch.equal(y, product(x, held, None, m, scheme))
    assert len(handed_over) == 1


@ON_CUDA
def test_x_need_not_be_on_the_current_device(handed_over: list[Tensor]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    scheme = Scheme(4, 64)
    held, x = ordinary(weight(scheme, 70, 320)), rows(3, 320, torch.bfloat16).cuda()
    there = [None if part is None else part.to("cuda:1") for part in held]
    y = product(x.to("cuda:1"), Packed(*there), None, 70, scheme)
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(y.cpu(), product(x, held, None, 70, scheme).cpu())
    assert not handed_over


@ON_CUDA
def test_the_end_of_memory_is_told_as_such(handed_over: list[Tensor]) -> None:
    m, n, scheme = 1 << 16, 32, Scheme(4, 32)
    linear = QuantLinear.from_quantized(weight(scheme, 1, n).q, scheme)
    (codes,), (scales,), _ = cuda.shapes(m, n, scheme)
    linear.out_features = m
    linear.codes = torch.zeros(codes, dtype=torch.uint8, device="cuda")
    linear.scales = torch.zeros(scales, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        linear(torch.zeros(1 << 22, n, dtype=torch.bfloat16, device="cuda"))  # whose result is half a terabyte
    assert len(handed_over) == 1
