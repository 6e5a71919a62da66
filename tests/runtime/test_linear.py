"""The packed linear layer."""

import pytest
import torch
from torch import nn

from llmquant.kernels.backends import PANELS, Kernels
from llmquant.kernels.layout import unpack
from llmquant.runtime import linear as module
from llmquant.runtime.linear import QuantLinear
from llmquant.scheme import Quantized, Scheme, dequantize


def quantized(scheme: Scheme, m: int = 12, n: int = 64) -> Quantized:
    generator = torch.Generator().manual_seed(0)
    grid = (m, scheme.groups(n))
    codes = torch.randint(0, scheme.max_code + 1, (m, n), dtype=torch.uint8, generator=generator)
    zeros = torch.full(grid, scheme.midpoint, dtype=torch.uint8)
    if not scheme.symmetric:
        zeros = torch.randint(0, scheme.max_code + 1, grid, dtype=torch.uint8, generator=generator)
    return Quantized(codes, torch.rand(grid, generator=generator).bfloat16().float(), zeros)


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, -1, symmetric=False), Scheme(8, 64)], ids=str)
def test_it_computes_what_the_dequantized_linear_computes(scheme: Scheme, bias: bool, tokens: int) -> None:
    q = quantized(scheme)
    dense = nn.Linear(64, 12, bias=bias).requires_grad_(False)
    dense.weight.copy_(dequantize(q, scheme))
    packed = QuantLinear.from_quantized(q, scheme, dense.bias)
    x = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(packed(x), dense(x), rtol=1e-5, atol=1e-4 * float(dense(x).abs().max()))


def test_it_holds_the_bytes_that_its_scheme_promises() -> None:
    linear = QuantLinear.from_quantized(quantized(Scheme(4, 32)), Scheme(4, 32))
    sizes = {name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in linear.named_buffers()}
    assert sizes == {"codes": (torch.uint8, (1, 8, 16, 4)), "scales": (torch.bfloat16, (1, 2, 16))}
    assert list(linear.parameters()) == []
    assert repr(linear) == "QuantLinear(in_features=64, out_features=12, int4 g32 symmetric)"


def test_a_cast_of_the_model_leaves_the_scales_alone() -> None:
    scheme = Scheme(4, 32)
    q = quantized(scheme)
    model = nn.Sequential(QuantLinear.from_quantized(q, scheme, nn.Parameter(torch.ones(12)))).half()
    linear = model[0]
    assert torch.equal(unpack(linear.packed, 12, 64, scheme).scales, q.scales)
    assert linear.bias.dtype == torch.float16
    assert model(torch.ones(1, 64, dtype=torch.float16)).dtype == torch.float16


def test_another_device_may_want_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """What moving to a GPU does, in the memory of the CPU; see tests/kernels/test_gpu_linear.py for the real one."""
    triton = pytest.importorskip("llmquant.kernels.triton", reason="needs Triton", exc_type=ImportError)
    gpu = Kernels(triton.shapes, triton.pack, triton.unpack, triton.linear)
    monkeypatch.setattr(module, "kernels_for", lambda device, _: gpu if device == "cuda" else PANELS)
    scheme = Scheme(4, 32, symmetric=False)
    linear = QuantLinear.from_quantized(quantized(scheme), scheme)
    before = linear.state_dict()
    linear._lay_out("cpu", "cuda")
    sizes = [tuple(buffer.shape) for buffer in linear.packed if buffer is not None]
    assert sizes == [*triton.shapes(12, 64, scheme)]
    linear._lay_out("cuda", "cpu")
    after = linear.state_dict()
    assert list(before) == list(after)
    assert all(map(torch.equal, before.values(), after.values()))


def test_memory_may_come_before_the_weight() -> None:
    scheme = Scheme(4, 32)
    before = QuantLinear.from_quantized(quantized(scheme), scheme).state_dict()
    empty = QuantLinear.from_quantized(quantized(scheme), scheme).to("meta").to_empty(device="cpu")
    empty.load_state_dict(before)
    assert all(map(torch.equal, empty.state_dict().values(), before.values()))


def test_state_dict_round_trip() -> None:
    scheme = Scheme(4, 32, symmetric=False)
    source = QuantLinear.from_quantized(quantized(scheme), scheme)
    target = QuantLinear.from_quantized(Quantized(*(torch.zeros_like(t) for t in quantized(scheme))), scheme)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(torch.ones(1, 64)), source(torch.ones(1, 64)))
