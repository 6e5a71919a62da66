"""The torch operator."""

from functools import cache

import pytest
import torch
from kernel_cases import SCHEMES, Weight, relative_error, weight
from torch._subclasses.fake_tensor import FakeTensorMode

from llmquant.errors import RecipeError
from llmquant.kernels import ops, reference
from llmquant.kernels.backends import PANELS, Kernels
from llmquant.kernels.cpu import PLANES, Native
from llmquant.native import BINDING, find_library
from llmquant.scheme import Scheme

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, int, int, int, int]


def operands(w: Weight, bias: torch.Tensor | None = None, planes: int = 2) -> Operands:
    return (*w.panels, bias, len(w.real), w.scheme.bits, w.scheme.group_size, planes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_operator_is_the_reference(scheme: Scheme, tokens: int) -> None:
    w, x, bias = weight(scheme, 8, 160), torch.randn(2, tokens, 160), torch.randn(8)
    y = torch.ops.llmquant.w4_linear(x, *operands(w, bias))
    expected = reference.linear(x, w.panels, bias, 8, scheme)
    assert relative_error(y, expected.double()) < 1e-3


@pytest.mark.parametrize("planes", PLANES.values(), ids=PLANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_accepts_the_operator(dtype: torch.dtype, planes: int) -> None:
    w = weight(Scheme(4, 32, symmetric=False), 8, 64)
    for x in (torch.randn(3, 64, dtype=dtype), torch.randn(2, 1, 64, dtype=dtype)):
        for bias in (torch.randn(8), None):
            torch.library.opcheck(torch.ops.llmquant.w4_linear.default, (x, *operands(w, bias, planes)))


def test_a_layout_is_asked_for_plain_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces with symbols for sizes; a cache, as the CUDA library's layout has, takes none."""
    monkeypatch.setattr(ops, "kernels_for", lambda *_: PANELS._replace(shapes=cache(PANELS.shapes)))
    w = weight(Scheme(4, 32, symmetric=False), 8, 64)
    torch.library.opcheck(torch.ops.llmquant.w4_linear.default, (torch.randn(3, 64), *operands(w)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("codes", lambda x, c, s, z, b: (x, c[:, 1:], s, z, b)),
        ("codes", lambda x, c, s, z, b: (x, c.to(torch.int8), s, z, b)),
        ("codes", lambda x, c, s, z, b: (x, c.transpose(1, 2).contiguous().transpose(1, 2), s, z, b)),
        ("scales", lambda x, c, s, z, b: (x, c, s[:, :1], z, b)),
        ("scales", lambda x, c, s, z, b: (x, c, s.double(), z, b)),
        ("zeros", lambda x, c, s, z, b: (x, c, s, z[:, :1], b)),
        ("bias", lambda x, c, s, z, b: (x, c, s, z, b[:1])),
        ("x", lambda x, c, s, z, b: (x.long(), c, s, z, b)),
    ],
)
def test_sizes_are_checked_before_native_code_trusts_them(name: str, change: object) -> None:
    w = weight(Scheme(4, 32, symmetric=False), 8, 64)
    assert callable(change)
    changed = change(torch.randn(2, 64), *w.panels, torch.randn(8))
    with pytest.raises(RuntimeError, match=f"w4_linear: {name} is "):
        torch.ops.llmquant.w4_linear(*changed, 8, 4, 32, 2)


def test_numbers_out_of_range_are_refused() -> None:
    w, x = weight(Scheme(4, 32), 8, 64), torch.randn(1, 64)
    with pytest.raises(RuntimeError, match="planes is 3; use 1 or 2"):
        torch.ops.llmquant.w4_linear(x, *operands(w, None, 3))
    for bits, group_size in ((5, 32), (4, 0), (4, 33), (4, -2)):
        with pytest.raises((RuntimeError, RecipeError), match=r"bits|group_size"):
            torch.ops.llmquant.w4_linear(x, *w.panels, None, 8, bits, group_size, 2)


def test_x_may_stand_in_any_order() -> None:
    w, x = weight(Scheme(4, 32), 8, 64), torch.randn(64, 5)
    y = torch.ops.llmquant.w4_linear(x.T, *operands(w))
    assert torch.equal(y, torch.ops.llmquant.w4_linear(x.T.contiguous(), *operands(w)))


def test_a_gpu_has_the_layout_of_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.compile sees the operator: shapes alone, of tensors on a GPU that need not be there."""
    triton = pytest.importorskip("llmquant.kernels.triton", reason="needs Triton", exc_type=ImportError)
    gpu = Kernels(triton.shapes, triton.pack, triton.unpack, triton.linear)
    monkeypatch.setattr(ops, "kernels_for", lambda device, _: gpu if device == "cuda" else PANELS)
    w = weight(Scheme(4, 32, symmetric=False), 8, 64)
    layouts = triton.pack(w.q, w.scheme), w.panels
    with FakeTensorMode():
        packed, panels = (
            [torch.empty(part.shape, dtype=part.dtype, device="cuda") for part in parts] for parts in layouts
        )
        x = torch.empty(2, 3, 64, dtype=torch.bfloat16, device="cuda")
        y = torch.ops.llmquant.w4_linear(x, *packed, None, 8, 4, 32, 2)
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 8), torch.bfloat16, "cuda")
        with pytest.raises(RuntimeError, match="w4_linear: codes is "):
            torch.ops.llmquant.w4_linear(x, *panels, None, 8, 4, 32, 2)
        with pytest.raises(RuntimeError, match=r"w4_linear: bias is .*, on cpu; expected .* on cuda"):
            torch.ops.llmquant.w4_linear(x, *packed, torch.empty(8), 8, 4, 32, 2)


def test_without_the_binding_the_library_is_called_all_the_same() -> None:
    """The same bytes by ctypes as through torch."""
    library = find_library()
    if isinstance(library, str):
        pytest.skip(f"the native library is not in use: {library}")
    w, x, bias = weight(Scheme(4, 32, symmetric=False), 24, 96), torch.randn(2, 3, 96).bfloat16(), torch.randn(24)
    y = Native(library).linear(x, w.panels, bias, 24, w.scheme)
    assert torch.equal(y, torch.ops.llmquant.w4_linear(x, *operands(w, bias)))
    assert y.shape == (2, 3, 24)


@pytest.mark.skipif(not BINDING.is_file(), reason=f"{BINDING.name} was not built: torch's headers were not at hand")
def test_torch_calls_the_library_itself_where_it_is_bound() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("llmquant::w4_linear", "CPU")
