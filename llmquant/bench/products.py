"""Products with one packed weight: ours and those of the peers that are installed."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmquant.kernels import ops  # noqa: F401  (defines torch.ops.llmquant)
from llmquant.kernels.cpu import PLANES
from llmquant.kernels.layout import pack
from llmquant.scheme import Quantized, Scheme, dequantize

READING = "reading memory"


class Product(NamedTuple):
    """A product that is ready to be called."""

    nbytes: int  # of the weight
    call: Callable[[Tensor], Tensor]  # x fp32 [k, n] to y [k, m]


Maker = Callable[[Quantized, Scheme], dict[str, Product]]


def makers() -> list[Maker]:
    """Each makes products, by name, with the weight that it is given."""
    optional = {onnx_runtime: ("onnx", "onnxruntime"), llama_cpp: ("llama_cpp",)}
    found = [make for make, needs in optional.items() if all(map(find_spec, needs))]
    return [reading, ours, torch_dense, torch_int4, *found]


def reading(q: Quantized, _: Scheme) -> dict[str, Product]:
    """What the memory allows: a sum of as many bytes as the codes have."""
    block = torch.ones(q.codes.numel() // 8)
    return {READING: Product(block.nbytes, lambda _: block.sum())}


def ours(q: Quantized, scheme: Scheme) -> dict[str, Product]:
    panels, m = pack(q, scheme), len(q.codes)
    nbytes = panels.codes.nbytes + panels.scales.nbytes

    def call(planes: int, x: Tensor) -> Tensor:
        return torch.ops.llmquant.w4_linear(x, *panels, None, m, 4, scheme.group_size, planes)

    return {f"llmquant {name}": Product(nbytes, partial(call, planes)) for name, planes in PLANES.items()}


def torch_dense(q: Quantized, scheme: Scheme) -> dict[str, Product]:
    W = dequantize(q, scheme)
    halves = W.bfloat16()
    return {
        "torch fp32": Product(W.nbytes, lambda x: torch.nn.functional.linear(x, W)),
        "torch bf16": Product(halves.nbytes, lambda x: torch.nn.functional.linear(x.bfloat16(), halves)),
    }


def torch_int4(q: Quantized, scheme: Scheme) -> dict[str, Product]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.codes.int(), 1)
    # Its zero point is real, and counted from the middle of the codes.
    grid = torch.stack((q.scales, torch.zeros_like(q.scales)), -1).transpose(0, 1).contiguous().bfloat16()
    g = scheme.group_size
    call = lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, g, grid)  # noqa: E731
    return {"torch int4pack": Product(packed.nbytes + grid.nbytes, call)}


def onnx_runtime(q: Quantized, scheme: Scheme) -> dict[str, Product]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    m, n = q.codes.shape
    codes = (q.codes[:, 0::2] | q.codes[:, 1::2] << 4).view(m, n // scheme.group_size, -1).numpy()
    constants = [numpy_helper.from_array(codes, "B"), numpy_helper.from_array(q.scales.flatten().numpy(), "scales")]
    sizes: dict[str, Any] = {"K": n, "N": m, "bits": 4, "block_size": scheme.group_size, "accuracy_level": 4}
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
    call = lambda x: torch.from_numpy(session.run(None, {"A": x.numpy()})[0])  # noqa: E731
    return {"ONNX Runtime, accuracy 4": Product(codes.nbytes + q.scales.nbytes, call)}


def llama_cpp(q: Quantized, scheme: Scheme) -> dict[str, Product]:
    """Q4_0, whose groups are of 32 and whose scales are fp16: the same codes, each scale as often as it takes."""
    from llmquant.bench.ggml import Q4_0, Ggml

    m, n = q.codes.shape
    blocks = q.codes.view(m, n // 32, 32)
    packed = blocks[..., :16] | blocks[..., 16:] << 4
    scales = q.scales.repeat_interleave(scheme.group_size // 32, 1).half().unsqueeze(-1).view(torch.uint8)
    weight = torch.cat((scales, packed), -1)
    return {"llama.cpp Q4_0": Product(weight.nbytes, Ggml.shared().product(weight, m, n, Q4_0))}
