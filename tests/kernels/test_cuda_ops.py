"""csrc/torch/cuda_ops.cpp, with operators of its own for tensors on the CPU, linked to the emulated CUDA library."""

import ctypes
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from emulated_cuda import Emulator, Linear, build_once
from kernel_cases import Weight, relative_error, weight
from torch import Tensor

from llmquant import native
from llmquant.kernels import cuda, ops
from llmquant.kernels.backends import PANELS, Kernels
from llmquant.kernels.layout import Packed
from llmquant.runtime import linear as layers
from llmquant.runtime.linear import QuantLinear
from llmquant.scheme import Scheme

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
if not (TORCH / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
    pytest.skip("torch's headers are not at hand", allow_module_level=True)

SCHEMES = [Scheme(4, g, symmetric) for g in (32, 128, -1) for symmetric in (True, False)]
BOUND = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
KERNELS = Kernels(cuda.shapes, cuda.pack, cuda.unpack, cuda.linear)
PLAIN = Scheme(4, 32, symmetric=False)

# The operators, as kernels/ops.py defines them, in a namespace that is the tests' own.
NAMESPACE = "llmquant_emulated"
handed_over: list[Tensor] = []  # x
definitions = torch.library.Library(NAMESPACE, "DEF")
for name in ("w4_linear", "w4_linear_any"):
    definitions.define(str(getattr(torch.ops.llmquant, name).default._schema).removeprefix("llmquant::"))
definitions.impl("w4_linear", lambda *operands: ops._w4_linear(*operands), "CompositeExplicitAutograd")
definitions.impl(
    "w4_linear_any",
    lambda *operands: handed_over.append(operands[0]) or ops._w4_linear_any(*operands),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(f"{NAMESPACE}::w4_linear", ops._w4_linear_fake)
OPERATOR = torch.ops.llmquant_emulated.w4_linear.default


@pytest.fixture(scope="session")
def library(emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    wrapped = [f"-Wl,--wrap=llmquant_cuda_{function}" for function in ("linear", "abi")]
    made = build_once(
        tmp_path_factory,
        "llmquant_torch_emulated.so",
        [
            *"-std=c++17 -O1 -Wall -Wextra -Werror -shared -fPIC -fvisibility=hidden".split(),
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            f'-DLLMQUANT_OPERATORS="{NAMESPACE}"',
            '-DLLMQUANT_DISPATCH_KEY="CPU"',
            "-isystem",
            TORCH / "include",
            ROOT / "csrc" / "torch" / "cuda_ops.cpp",
            ROOT / "tests" / "kernels" / "emulated_torch.cpp",
            *wrapped,
            emulator.functions._name,
            f"-L{TORCH / 'lib'}",
            "-ltorch_cpu",
        ],
    )
    return ctypes.CDLL(str(made))


class Binding:
    """The library, and what it was asked."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name in ("capturing", "no_stream", "no_capture_state", "calls"):
            self.set(name, 0)
        self.set("answer", 0, ctypes.c_int64)
        self.set("abi", 0, ctypes.c_int64)
        self.use_stream(0)
        handed_over.clear()

    def set(self, name: str, value: int, kind: type = ctypes.c_int32) -> None:
        kind.in_dll(self.library, name).value = value

    def use_stream(self, stream: int) -> None:
        """In this thread."""
        self.library.use_stream(ctypes.c_void_p(stream))

    def withdraw(self) -> None:
        assert not self.library.llmquant_torch_cuda_serve(None, None)

    @property
    def calls(self) -> int:
        return int(ctypes.c_int32.in_dll(self.library, "calls").value)

    @property
    def stream(self) -> int:
        return ctypes.c_void_p.in_dll(self.library, "last_stream").value or 0

    @property
    def last(self) -> Linear:
        """The last product's task."""
        return Linear.in_dll(self.library, "last")

    @property
    def tickets(self) -> tuple[int, list[int]]:
        """Where those of the last product are, and what they are now."""
        task = self.last
        return task.tickets or 0, list((ctypes.c_uint32 * task.tickets_count).from_address(task.tickets or 0))


@pytest.fixture
def binding(
    library: ctypes.CDLL, emulated_library: native.CudaLibrary, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Binding]:
    """Bound as `native.bind_cuda` does it, and Python's own way beside it."""
    monkeypatch.setattr(native, "CUDA_BINDING", Path(library._name))
    monkeypatch.setattr(native, "TORCH_CUDA", Path(library._name))
    monkeypatch.setattr(ops, "find_library", lambda: "emulated")
    monkeypatch.setattr(ops, "kernels_for", lambda _, bits: KERNELS if bits == 4 else PANELS)
    bound = Binding(library)
    assert native.bind_cuda() == "called by torch itself"
    yield bound
    bound.withdraw()


def product(x: Tensor, held: Packed, bias: Tensor | None, m: int, scheme: Scheme, planes: int = 2) -> Tensor:
    return OPERATOR(x, *held, bias, m, scheme.bits, scheme.group_size, planes)


def rows(tokens: int, n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def pack(w: Weight, dtype: torch.dtype) -> Packed:
    """With scales of the dtype of x, which is ordinary."""
    held = cuda.pack(w.q, w.scheme)
    return held._replace(scales=held.scales.to(dtype))


def same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)


# ---- what is served


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", [(64, 128, 1), (70, 152, 5), (129, 40, 20)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products(
    scheme: Scheme,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    capability: int,
    binding: Binding,
    emulator: Emulator,
) -> None:
    """The bits that the library gives to Python."""
    emulator.emulate(capability=capability)
    m, n, tokens = shape
    w, x = weight(scheme, m, n), rows(tokens, n, dtype)
    held = pack(w, dtype)
    for i, bias in enumerate((None, torch.linspace(-1, 1, m), torch.linspace(-1, 1, m).to(dtype))):
        y = product(x, held, bias, m, scheme)
        assert relative_error(y, x.double() @ w.real.T + (0 if bias is None else bias.double())) < BOUND[dtype]
        assert same(y, cuda.linear(x, held, bias, m, scheme))
        assert binding.calls == i + 1
    assert not handed_over


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 1, 2, 64)], ids=str)
def test_results_have_the_leading_dimensions_of_x(shape: tuple[int, ...], binding: Binding) -> None:
    held = pack(weight(PLAIN, 40, 64), torch.bfloat16)
    x = torch.randn(shape).bfloat16()
    y = product(x, held, None, 40, PLAIN)
    assert same(y, cuda.linear(x, held, None, 40, PLAIN))
    assert y.is_contiguous()
    assert (binding.calls, len(handed_over)) == (1, 0)


def test_products_are_on_the_current_stream(binding: Binding) -> None:
    held = pack(weight(PLAIN, 40, 64), torch.bfloat16)
    for stream in (0x5000, 0, 0x6000):
        binding.use_stream(stream)
        product(rows(2, 64), held, None, 40, PLAIN)
        assert binding.stream == stream
        assert binding.last.overlap == 1


def test_torch_accepts_the_operator(binding: Binding) -> None:
    w = weight(PLAIN, 40, 64)
    for bias in (None, torch.randn(40)):
        operands = (rows(3, 64), *pack(w, torch.bfloat16), bias, 40, 4, 32, 2)
        torch.library.opcheck(OPERATOR, operands)
    assert binding.calls > 0
    assert not handed_over


# ---- tickets


def sharing(m: int) -> tuple[Weight, Packed, Tensor]:
    """A product whose tiles are shared by the two multiprocessors of sm_80, so that it needs tickets."""
    w = weight(Scheme(4, 64), m, 256)
    return w, pack(w, torch.bfloat16), rows(2, 256)


def test_tickets_are_zero_again_and_grow(binding: Binding, emulator: Emulator) -> None:
    emulator.emulate(capability=80, processors=3)
    binding.use_stream(0x7000)
    seen = []
    for m in (64, 64, 64 * 9, 64):
        w, held, x = sharing(m)
        y = product(x, held, None, m, w.scheme)
        assert same(y, cuda.linear(x, held, None, m, w.scheme))
        place, numbers = binding.tickets
        assert place
        assert numbers
        assert not any(numbers)
        seen.append((place, len(numbers)))
    assert seen[0] == seen[1]
    assert seen[2][1] > seen[1][1]
    assert seen[3] == seen[2]
    assert not handed_over


def test_each_stream_has_its_own_tickets(binding: Binding, emulator: Emulator) -> None:
    emulator.emulate(capability=80, processors=3)
    w, held, x = sharing(64)
    places = []
    for stream in (0x8000, 0x9000, 0x8000):
        binding.use_stream(stream)
        product(x, held, None, 64, w.scheme)
        places.append(binding.tickets[0])
    assert places[0] == places[2] != places[1]


def test_threads_may_multiply_at_once(binding: Binding, emulator: Emulator) -> None:
    """Some on a stream that they share: longer tickets are asked for while others hold shorter ones."""
    emulator.emulate(capability=80, processors=3)
    cases = [(m, *sharing(m)) for m in (64, 64 * 5, 64 * 9, 64 * 13)]
    expected = [cuda.linear(x, held, None, m, w.scheme) for m, w, held, x in cases]
    begin = threading.Barrier(8)

    def multiply(number: int) -> list[Tensor]:
        binding.use_stream(0xA000 + number // 4)
        begin.wait()
        return [product(x, held, None, m, w.scheme) for _ in range(3) for m, w, held, x in cases[number % 4 :]]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(multiply, range(8)))
    for number, ys in enumerate(found):
        assert all(map(same, ys, expected[number % 4 :] * 3))
    assert binding.calls == sum(map(len, found))
    assert not handed_over


# ---- what is handed over


@pytest.mark.parametrize("unusual", ["capturing", "no_capture_state", "no_stream"])
def test_products_in_graphs_are_handed_over(unusual: str, binding: Binding) -> None:
    """And those of which that cannot be told."""
    binding.set(unusual, 1)
    w, x = weight(PLAIN, 40, 64), rows(3, 64)
    held = pack(w, torch.bfloat16)
    assert same(product(x, held, None, 40, PLAIN), cuda.linear(x, held, None, 40, PLAIN))
    assert (binding.calls, len(handed_over)) == (0, 1)


UNUSUAL: dict[str, tuple[Scheme, int, Callable[[Tensor], Tensor]]] = {
    "8 bits": (Scheme(8, 32), 64, lambda x: x),
    "fp32": (PLAIN, 64, lambda x: x.float()),
    "scales in another dtype": (PLAIN, 64, lambda x: x.half()),
    "columns": (PLAIN, 33, lambda x: x),
    "strided": (PLAIN, 64, lambda x: x.T.contiguous().T),
    "not aligned": (PLAIN, 64, lambda x: torch.cat((x.new_empty(1), x.flatten()))[1:].view(x.shape)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_ordinary_is_handed_over(name: str, binding: Binding) -> None:
    scheme, n, change = UNUSUAL[name]
    w, x = weight(scheme, 40, n), change(rows(3, n))
    held = cuda.pack(w.q, scheme) if scheme.bits == 4 else w.panels
    y = product(x, held, torch.ones(40), 40, scheme)
    assert y.dtype == x.dtype
    assert relative_error(y, x.double() @ w.real.T + 1) < BOUND[torch.bfloat16]
    assert (binding.calls, len(handed_over)) == (0, 1)


def test_no_tokens_are_handed_over(binding: Binding) -> None:
    held = pack(weight(PLAIN, 40, 64), torch.bfloat16)
    assert product(rows(3, 64).new_empty(2, 0, 64), held, None, 40, PLAIN).shape == (2, 0, 40)
    assert (binding.calls, len(handed_over)) == (0, 1)


def test_what_is_for_slabs_is_handed_over(binding: Binding, emulator: Emulator) -> None:
    """On sm_80, many tokens: the library then refuses to multiply."""
    emulator.emulate(capability=80)
    w, x = weight(PLAIN, 40, 64), rows(257, 64)
    y = product(x, pack(w, torch.bfloat16), None, 40, PLAIN)
    assert relative_error(y, x.double() @ w.real.T) < BOUND[torch.bfloat16]
    assert (binding.calls, len(handed_over)) == (1, 1)


def of_one_group(*parts: Tensor) -> list[Tensor]:
    """In the place of four, for the 64 columns filled up to 128; the library takes groups of 256."""
    return [part[: len(part) // 4] for part in parts]


WRONG: dict[str, Callable[..., tuple[Tensor | int | None, ...]]] = {
    "codes: too few": lambda x, c, s, z, b, *rest: (x, c[16:], s, z, b, *rest),
    "codes: another dtype": lambda x, c, s, z, b, *rest: (x, c.view(torch.int8), s, z, b, *rest),
    "codes: another shape": lambda x, c, s, z, b, *rest: (x, c.view(2, -1), s, z, b, *rest),
    "codes: strided": lambda x, c, s, z, b, *rest: (x, c.repeat_interleave(2)[::2], s, z, b, *rest),
    "codes: elsewhere": lambda x, c, s, z, b, *rest: (x, c.to("meta"), s, z, b, *rest),
    "scales: too few": lambda x, c, s, z, b, *rest: (x, c, s[8:], z, b, *rest),
    "scales: another dtype": lambda x, c, s, z, b, *rest: (x, c, s.double(), z, b, *rest),
    "scales: integers": lambda x, c, s, z, b, *rest: (x, c, s.view(torch.int16), z, b, *rest),
    "zeros: too many": lambda x, c, s, z, b, *rest: (x, c, s, z.repeat(2), b, *rest),
    "zeros: another dtype": lambda x, c, s, z, b, *rest: (x, c, s, z.view(torch.int8), b, *rest),
    "bias: too few": lambda x, c, s, z, b, *rest: (x, c, s, z, b[:1], *rest),
    "bias: another dtype": lambda x, c, s, z, b, *rest: (x, c, s, z, b.double(), *rest),
    "bias: elsewhere": lambda x, c, s, z, b, *rest: (x, c, s, z, b.to("meta"), *rest),
    "bias: strided": lambda x, c, s, z, b, *rest: (x, c, s, z, b.repeat_interleave(2)[::2], *rest),
    "x: another dtype": lambda x, c, s, z, b, *rest: (x.long(), c, s, z, b, *rest),
    "x: other columns": lambda x, c, s, z, b, *rest: (x[:, :32].contiguous(), c, s, z, b, *rest),
    "x: no columns": lambda x, c, s, z, b, *rest: (x[:, :0], c, s, z, b, *rest),
    "x: a number": lambda x, c, s, z, b, *rest: (x[0, 0], c, s, z, b, *rest),
    "rows: others": lambda x, c, s, z, b, m, *rest: (x, c, s, z, None, 400, *rest),
    "rows: none": lambda x, c, s, z, b, m, *rest: (x, c, s, z, b, 0, *rest),
    "bits: 5": lambda x, c, s, z, b, m, bits, *rest: (x, c, s, z, b, m, 5, *rest),
    "group_size: 256": lambda x, c, s, z, b, m, bits, g, planes: (x, c, *of_one_group(s, z), b, m, bits, 256, planes),
    "group_size: 0": lambda x, c, s, z, b, m, bits, g, planes: (x, c, s, z, b, m, bits, 0, planes),
    "planes: 3": lambda x, c, s, z, b, m, bits, g, planes: (x, c, s, z, b, m, bits, g, 3),
}


@pytest.mark.parametrize("name", WRONG)
def test_operands_that_do_not_fit_are_refused_in_the_same_words(name: str, binding: Binding) -> None:
    w = weight(PLAIN, 40, 64)
    operands = WRONG[name](rows(3, 64), *pack(w, torch.bfloat16), torch.ones(40), 40, 4, 32, 2)
    with pytest.raises(Exception, match=rf"(w4_linear|llmquant_cuda_sizes|{name.partition(':')[0]}).*") as alone:
        ops._w4_linear(*operands)
    with pytest.raises(RuntimeError) as bound:
        OPERATOR.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *operands)  # wherever they are
    assert str(bound.value) == str(alone.value)
    assert (binding.calls, len(handed_over)) == (0, 1)


def test_a_part_that_begins_anywhere_is_refused(binding: Binding) -> None:
    """By the library, which asks for 16 bytes."""
    held = pack(weight(PLAIN, 40, 64), torch.bfloat16)
    shifted = torch.cat((held.codes[:1], held.codes))[1:]
    operands = (rows(3, 64), *held._replace(codes=shifted), None, 40, 4, 32, 2)
    with pytest.raises(RuntimeError, match=r"^llmquant_cuda_.*: .*16 bytes"):
        OPERATOR(*operands)
    assert len(handed_over) == 1


# ---- what goes wrong


def test_what_the_device_says_is_said(binding: Binding) -> None:
    """Once: a product that was begun is not begun again."""
    binding.set("answer", 700, ctypes.c_int64)
    with pytest.raises(RuntimeError, match=r"^llmquant_cuda_linear: "):
        product(rows(3, 64), pack(weight(PLAIN, 40, 64), torch.bfloat16), None, 40, PLAIN)
    assert not handed_over


def test_without_room_for_the_result_torch_says_so(binding: Binding) -> None:
    m, tokens = 4096, 1 << 20
    held = Packed(*(torch.zeros(size, dtype=torch.uint8) for (size,) in cuda.shapes(m, 32, PLAIN)))
    held = held._replace(scales=torch.zeros(cuda.shapes(m, 32, PLAIN)[1], dtype=torch.bfloat16))
    x = torch.zeros(tokens, 32, dtype=torch.bfloat16)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limits[1]))
    try:
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            product(x, held, None, m, PLAIN)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (binding.calls, len(handed_over)) == (0, 1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), KeyboardInterrupt()], ids=repr)
def test_a_layer_raises_what_python_raised(
    error: BaseException, binding: Binding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From C++ comes a RuntimeError; a server has to know its memory's end, and a user may stop a program."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(layers, "W4_LINEAR", OPERATOR)
    monkeypatch.setattr(layers, "kernels_for", ops.kernels_for)
    layer, ordinary = (QuantLinear.from_quantized(weight(PLAIN, 40, n).q, PLAIN) for n in (33, 64))
    monkeypatch.setattr(ops, "kernels_for", lambda *_: KERNELS._replace(linear=fail))
    operands = (rows(3, 33), *layer.packed, None, 40, 4, 32, 2)
    with pytest.raises(RuntimeError, match=r"^(no room|KeyboardInterrupt)$") as bound:
        OPERATOR(*operands)
    assert type(bound.value) is RuntimeError
    binding.set("answer", 700, ctypes.c_int64)
    with pytest.raises(RuntimeError, match=r"^llmquant_cuda_linear: "):  # not what was raised before
        ordinary(rows(3, 64))
    with pytest.raises(type(error)) as raised:
        layer(rows(3, 33))
    assert raised.value is error


# ---- whether it serves


def serves() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::w4_linear", "CPU")


def test_after_it_is_withdrawn_python_multiplies(binding: Binding) -> None:
    assert serves()
    held, x = pack(weight(PLAIN, 40, 64), torch.bfloat16), rows(3, 64)
    y = product(x, held, None, 40, PLAIN)
    binding.withdraw()
    assert not serves()
    assert same(product(x, held, None, 40, PLAIN), y)
    assert (binding.calls, len(handed_over)) == (1, 0)
    assert native.bind_cuda() == "called by torch itself"
    assert same(product(x, held, None, 40, PLAIN), y)
    assert binding.calls == 2


def test_the_library_of_another_version_is_not_bound(binding: Binding) -> None:
    binding.set("abi", native.CUDA_ABI + 1, ctypes.c_int64)
    assert native.bind_cuda() == (
        "called through Python: llmquant_torch_emulated.so cannot be used: it belongs to another llmquant_cuda.so; "
        "install llmquant again"
    )
    assert not serves()


def test_a_torch_without_what_is_needed_is_not_bound(
    binding: Binding, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "TORCH_CUDA", Path(emulator.functions._name))
    assert "undefined symbol: aoti_torch_get_current_cuda_stream" in native.bind_cuda()
    monkeypatch.setattr(native, "TORCH_CUDA", Path("/nowhere/libtorch_cuda.so"))
    assert native.bind_cuda().startswith("called through Python: llmquant_torch_emulated.so cannot be used: /nowhere/")
