"""MatMulNBits operands: golden bytes, and the product of ONNX Runtime where it is installed."""

import numpy as np
import pytest
import torch
from formats_cases import SCHEMES, quantized

from llmquant.formats import onnx as operands
from llmquant.scheme import Quantized, Scheme, dequantize


def test_golden_bytes() -> None:
    codes = (torch.arange(96) % 16).to(torch.uint8)[None]
    zeros = torch.tensor([[3, 7, 11]], dtype=torch.uint8)
    found = operands.pack(Quantized(codes, torch.ones(1, 3), zeros), Scheme(4, 32, symmetric=False))
    assert found["B"][0, 0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2
    assert found["zero_points"].tolist() == [[0x73, 0x0B]]


@pytest.mark.parametrize("n", [256, 160])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_shapes_and_the_product_of_onnxruntime(scheme: Scheme, n: int) -> None:
    if n % scheme.width(n):
        n = 128
    q = quantized(scheme, m=16, n=n)
    found = operands.pack(q, scheme)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in found.items()} == operands.specs(16, n, scheme)
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    tensors = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in found.items()]
    options = {"K": n, "N": 16, "bits": operands.width(scheme), "block_size": operands.block_size(scheme)}
    node = onnx.helper.make_node("MatMulNBits", ["A", *found], ["Y"], domain="com.microsoft", **options)
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, None]) for name in "AY"]
    graph = onnx.helper.make_graph([node], "product", values[:1], values[1:], tensors)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (weight,) = session.run(None, {"A": np.eye(n, dtype=np.float32)})
    assert torch.equal(torch.from_numpy(weight).T, dequantize(q, scheme))
