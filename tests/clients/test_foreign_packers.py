"""What the packers of other tools make of a weight is what we read, and what we write of it is the same bytes."""

from typing import Any

import pytest
import torch
from client_checks import needs
from torch import Tensor, nn

from llmquant.formats import awq, compressed_tensors
from llmquant.formats.gptq import V1, V2, Gptq
from llmquant.scheme import Quantized, Scheme

M, N, G = 64, 128, 32


def weight(scheme: Scheme, groups: Tensor) -> tuple[Quantized, Tensor]:
    """Integers at random, of columns in `groups` [n], scales exact in fp16 and bf16; and the real weight."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda low, *shape: torch.randint(low, scheme.max_code + 1, shape, generator=generator)  # noqa: E731
    zeros = torch.full((M, N // G), scheme.midpoint) if scheme.symmetric else draw(1, M, N // G)
    scales = (0.5 + torch.rand(M, N // G, generator=generator)).bfloat16().float()
    codes = draw(0, M, N)
    codes[:, 0::16], codes[:, 1::16] = 0, scheme.max_code
    real = scales[:, groups] * (codes - zeros[:, groups])
    return Quantized(codes.to(torch.uint8), scales, zeros.to(torch.uint8)), real


def linear(real: Tensor) -> nn.Linear:
    module = nn.Linear(N, M, bias=False)
    module.weight.data = real.clone()
    return module


def check(layout: Any, scheme: Scheme, theirs: dict[str, Tensor], q: Quantized) -> None:
    """`q` with its columns where they are in the weight."""
    stored = {f"p.{name}": tensor for name, tensor in theirs.items()}
    order = layout.order("p", stored, N, scheme)
    found = layout.unpack("p", stored, M, N, scheme)
    assert torch.equal(found.codes, q.codes if order is None else q.codes[:, order])
    assert torch.equal(found.scales, q.scales)
    assert torch.equal(found.zeros, q.zeros)
    for name, tensor in layout.pack("p", found, scheme, torch.bfloat16, order).items():
        assert torch.equal(tensor, stored.get(name, tensor).to(tensor.dtype)), name


@needs("gptqmodel")
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptqmodel(bits: int, act_order: bool) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    scheme, groups = Scheme(bits, G, symmetric=False), torch.arange(N) // G
    if act_order:
        groups = groups[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    q, real = weight(scheme, groups)
    module = TorchLinear(
        bits=bits, group_size=G, sym=False, desc_act=act_order, in_features=N, out_features=M, bias=False,
        register_buffers=True,
    )  # fmt: skip
    module.pack_original(
        linear=linear(real), scales=q.scales.clone(), zeros=q.zeros.float(), g_idx=groups.to(torch.int32)
    )
    check(V2, scheme, {name: getattr(module, name) for name in ("qweight", "qzeros", "scales", "g_idx")}, q)


@needs("auto_round")
@pytest.mark.parametrize(("layout", "home"), [(V1, "qlinear_torch_zp"), (V2, "qlinear_torch")])
def test_auto_round(layout: Gptq, home: str) -> None:
    from importlib import import_module

    packer = import_module(f"auto_round_extension.torch.{home}").QuantLinear
    scheme = Scheme(4, G, symmetric=False)
    q, real = weight(scheme, torch.arange(N) // G)
    module = packer(4, G, N, M, False)
    module.device = torch.device("cpu")
    module.pack(linear(real), q.scales, q.zeros.float(), None, device="cpu")
    check(layout, scheme, {name: getattr(module, name) for name in ("qweight", "qzeros", "scales")}, q)


@needs("auto_round")
def test_auto_round_as_awq() -> None:
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM

    scheme = Scheme(4, G, symmetric=False)
    q, real = weight(scheme, torch.arange(N) // G)
    scales, zeros = q.scales.T.contiguous(), q.zeros.T.contiguous().float()
    module = WQLinear_GEMM.from_linear(linear(real), 4, G, False, scales, zeros)
    check(awq, scheme, {name: getattr(module, name).cpu() for name in ("qweight", "qzeros", "scales")}, q)


@needs("compressed_tensors")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_compressed_tensors(bits: int, symmetric: bool) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = Scheme(bits, G, symmetric)
    q, real = weight(scheme, torch.arange(N) // G)
    options = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=G)
    state = {
        "weight": real,
        "weight_scale": q.scales,
        "weight_zero_point": (q.zeros.int() - scheme.midpoint).to(torch.int8),
    }
    packed = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=options))
    check(compressed_tensors, scheme, packed, q)
