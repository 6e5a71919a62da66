"""Products with one packed weight on a GPU: ours and those of the peers that are installed."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import ModuleType

import torch

from llmquant.bench.products import Product
from llmquant.formats import bits
from llmquant.native import CUDA_LIBRARY
from llmquant.scheme import Quantized, Scheme, dequantize

DENSE = "cuBLAS"
Maker = Callable[[Quantized, Scheme, torch.dtype], Product]  # x of that dtype [k, n] to y [k, m]


def makers(dtype: torch.dtype, *, paths: bool = False) -> dict[str, Maker]:
    """Each makes a product with a weight of its own; with `paths`, ours also by each of its kernels."""
    found: dict[str, Maker] = {}
    if CUDA_LIBRARY.is_file():
        from llmquant.kernels import cuda

        found["llmquant"] = partial(ours, cuda)
        for name in ("gemv", "cluster", "gemm", "wgmma", "pairs", "boxes", "split", "dequantize") if paths else ():
            found[f"llmquant {name}"] = partial(ours, cuda, path=getattr(cuda, name.upper()))
    if find_spec("triton"):
        from llmquant.kernels import triton

        found["llmquant triton"] = partial(ours, triton)
    found[DENSE] = dense
    if dtype == torch.bfloat16:
        found["torch int4pack"] = torch_int4
    if find_spec("gemlite"):
        found["gemlite"] = gemlite
    if find_spec("vllm"):
        found |= {"Marlin": marlin, "Machete": machete}
    return found


def ours(kernels: ModuleType, q: Quantized, scheme: Scheme, dtype: torch.dtype, **chosen: int) -> Product:
    packed, m = kernels.pack(q, scheme), len(q.codes)
    packed = packed._replace(scales=packed.scales.to(dtype))
    nbytes = packed.codes.nbytes + packed.scales.nbytes
    return Product(nbytes, lambda x: kernels.linear(x, packed, None, m, scheme, **chosen))


def dense(q: Quantized, scheme: Scheme, dtype: torch.dtype) -> Product:
    W = dequantize(q, scheme).to(dtype)
    return Product(W.nbytes, lambda x: torch.nn.functional.linear(x, W))


def torch_int4(q: Quantized, scheme: Scheme, dtype: torch.dtype) -> Product:
    packed = torch.ops.aten._convert_weight_to_int4pack(q.codes[:, ::2] << 4 | q.codes[:, 1::2], 8)
    # Its zero point is real, and counted from the middle of the codes.
    grid = torch.stack((q.scales, torch.zeros_like(q.scales)), -1).transpose(0, 1).contiguous().to(dtype)
    call = lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, scheme.group_size, grid)  # noqa: E731
    return Product(packed.nbytes + grid.nbytes, call)


def gemlite(q: Quantized, scheme: Scheme, dtype: torch.dtype) -> Product:
    from gemlite.helper import A16W4_HQQ_INT

    device, (m, n) = str(q.codes.device), q.codes.shape
    scales, zeros = (grid.reshape(-1, 1).to(dtype) for grid in (q.scales, q.zeros))
    layer = A16W4_HQQ_INT(device=device, dtype=dtype).from_weights(q.codes.view(m, n), scales, zeros)
    return Product(m * n // 2 + scales.nbytes, layer)


def marlin(q: Quantized, scheme: Scheme, dtype: torch.dtype) -> Product:
    """As vLLM 0.32 calls it for a symmetric compressed-tensors checkpoint; m a multiple of 64, n of 128."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils as tools
    from vllm.scalar_type import scalar_types

    m, n = q.codes.shape
    weight = ops.gptq_marlin_repack(words_by_columns(q), size_k=n, size_n=m, num_bits=4)
    scales = tools.marlin_permute_scales(q.scales.T.to(dtype).contiguous(), n, m, scheme.group_size)
    call = partial(
        tools.apply_gptq_marlin_linear,
        weight=weight,
        weight_scale=scales,
        weight_zp=tools.marlin_make_empty(weight.device),
        workspace=tools.marlin_make_workspace_new(weight.device, tools.MARLIN_MAX_BLOCKS_PER_SM),
        wtype=scalar_types.uint4b8,
        output_size_per_partition=m,
        input_size_per_partition=n,
    )
    return Product(weight.nbytes + scales.nbytes, call)


def machete(q: Quantized, scheme: Scheme, dtype: torch.dtype) -> Product:
    """The same by vLLM's kernel for Hopper."""
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    told = {"b_type": scalar_types.uint4b8}
    by_rows = words_by_columns(q).T.contiguous().T  # it asks for the strides of a transpose
    weight = ops.machete_prepack_B(by_rows, a_type=dtype, group_scales_type=dtype, **told)
    scales = q.scales.T.to(dtype).contiguous()
    call = partial(ops.machete_mm, b_q=weight, b_group_scales=scales, b_group_size=scheme.group_size, **told)
    return Product(weight.nbytes + scales.nbytes, call)


def words_by_columns(q: Quantized) -> torch.Tensor:
    """Codes as int32 [n / 8, m], eight columns to a word: what GPTQ checkpoints hold and vLLM makes its layouts of."""
    return bits.pack(q.codes, 4).T.contiguous()
