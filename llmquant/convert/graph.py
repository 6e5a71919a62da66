"""An ONNX graph under construction, whose large tensors lie in a file of their own and are made as that is written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import ModelProto, NodeProto, StringStringEntryProto, TensorProto, ValueInfoProto, helper
from torch import Tensor

DATA = "model.onnx.data"
ALIGNMENT = 4096  # bytes, of the beginning of each tensor: a page, so that the file can be mapped
OPSETS = {"": 23, "com.microsoft": 1}  # 23: RMSNormalization
IR_VERSION = 11
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.uint8: TensorProto.UINT8,
}


@dataclass
class Graph:
    """Nodes in the order of their computation; `make` gives the tensor of each name in `weights`."""

    nodes: list[NodeProto] = field(default_factory=list)
    small: list[TensorProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)
    make: list[Callable[[], Tensor]] = field(default_factory=list)
    size: int = 0  # bytes of the file so far

    def op(self, kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        """A node with one result, which has its name."""
        return self.ops(kind, *inputs, names=(name,), **attributes)[0]

    def ops(self, kind: str, *inputs: str, names: tuple[str, ...], **attributes: Any) -> tuple[str, ...]:
        """A node with several results."""
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"{names[0]}/{kind}", **attributes))
        return names

    def integers(self, name: str, *values: int) -> str:
        """A constant int64 [len(values)]."""
        self.small.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def weight(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> str:
        """A tensor of the file."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        place = {"location": DATA, "offset": str(self.size), "length": str(nbytes)}
        entries = [StringStringEntryProto(key=key, value=value) for key, value in place.items()]
        tensor = TensorProto(name=name, data_type=TYPES[dtype], dims=shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.extend(entries)
        self.weights.append(tensor)
        self.make.append(make)
        self.size += nbytes + -nbytes % ALIGNMENT
        return name

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes of the file."""
        for make in self.make:
            data = make().contiguous().flatten().view(torch.uint8)
            yield data.numpy().data
            yield bytes(-len(data) % ALIGNMENT)

    def model(self, name: str, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> ModelProto:
        graph = helper.make_graph(self.nodes, name, inputs, outputs, [*self.small, *self.weights])
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="llmquant")
