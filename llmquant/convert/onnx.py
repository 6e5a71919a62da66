"""A model as an ONNX graph for ONNX Runtime: MatMulNBits with the integers that the checkpoint holds.

    inputs    input_ids int64 [batch, new], attention_mask int64 [batch, all], padded on the right
              past_key_values.<i>.key, .value fp32 [batch, kv_heads, past, head_width], past = all - new
    outputs   logits fp32 [batch, new, vocabulary], present.<i>.key, .value

The graph computes in fp32. Rotation, cache and causal attention are ONNX Runtime's GroupQueryAttention, which takes one
token of each sequence, a prompt of each, or more of the prompt of a single one; norms and the rest are plain ONNX.
"""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto, TensorProto, ValueInfoProto, helper
from torch import Tensor

from llmquant.checkpoint import durable
from llmquant.convert.graph import DATA, Graph
from llmquant.convert.product import Product, json_file, side_files
from llmquant.convert.source import Source
from llmquant.errors import ArchitectureError
from llmquant.formats import onnx as operands
from llmquant.formats.checks import check_in_place

FILE = "model.onnx"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROTATIONS = ("default", "linear", "llama3", "yarn")  # that depend on the position alone
MICROSOFT = "com.microsoft"


def product(source: Source) -> Product:
    """Graph, weights, tokenizer and config.json.

    Raises:
        ArchitectureError: the model is of no family that is written here.
        RecipeError: act-order.
    """
    config = source.config
    rotation = (config.rope_parameters or {}).get("rope_type", "default") if hasattr(config, "rope_parameters") else ""
    if config.model_type not in FAMILIES or config.hidden_act != "silu" or rotation not in ROTATIONS:
        raise ArchitectureError(f"{config.model_type}: is not written as ONNX; models of {', '.join(FAMILIES)} are")
    for name in source.schemes:
        check_in_place(name, source.order(name), "onnx")
    writer = _Writer(source)
    model = writer.write()
    plain = {key: value for key, value in source.checkpoint.config.items() if key != "quantization_config"}
    files = side_files(source) | {
        "config.json": json_file(plain),
        DATA: lambda path: durable.write_file(path, writer.graph.chunks(), writer.graph.size),
        FILE: partial(_write_model, model),
    }
    return Product(files, ())


def _write_model(model: ModelProto, path: Path) -> str:
    data = model.SerializeToString(deterministic=True)
    return durable.write_file(path, [data], len(data))


class _Writer:
    """The forward pass of the family, node by node."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.config: Any = source.config
        self.graph = Graph()
        self.names = set(source.model.state_dict())
        self.width = getattr(self.config, "head_dim", None) or (
            self.config.hidden_size // self.config.num_attention_heads
        )
        self.packed = lru_cache(maxsize=1)(self._pack)  # the operands of a linear are neighbours

    def write(self) -> ModelProto:
        graph, config = self.graph, self.config
        rotation = self.positions()
        table = self.stored("model.embed_tokens.weight")
        x = graph.op("Gather", table, "input_ids", name="embedded")
        x = graph.op("Cast", x, name="x", to=TensorProto.FLOAT)
        for i in range(config.num_hidden_layers):
            x = self.layer(x, i, rotation)
        x = self.norm(x, "model.norm")
        if "lm_head.weight" in self.names and not getattr(config, "tie_word_embeddings", False):
            self.linear(x, "lm_head", result="logits")
        else:
            self.dense(x, table, "logits")
        return graph.model(config.model_type, self.inputs(), self.outputs())

    def layer(self, x: str, i: int, rotation: tuple[str, ...]) -> str:
        graph, prefix = self.graph, f"model.layers.{i}"
        normed = self.norm(x, f"{prefix}.input_layernorm")
        heads = [self.linear(normed, f"{prefix}.self_attn.{name}_proj") for name in "qkv"]
        for place, name in enumerate("qk"):
            if f"{prefix}.self_attn.{name}_norm.weight" in self.names:
                heads[place] = self.head_norm(heads[place], f"{prefix}.self_attn.{name}_norm")
        past = [f"past_key_values.{i}.{kind}" for kind in ("key", "value")]
        names = (f"{prefix}.self_attn", *(f"present.{i}.{kind}" for kind in ("key", "value")))
        options: dict[str, Any] = {"num_heads": self.config.num_attention_heads, "do_rotary": 1}
        window = getattr(self.config, "sliding_window", None)
        if window and getattr(self.config, "use_sliding_window", True):
            options["local_window_size"] = window
        kv_heads = self.config.num_key_value_heads
        attended, *_ = graph.ops(
            "GroupQueryAttention",
            *heads,
            *past,
            *rotation,
            names=names,
            domain=MICROSOFT,
            kv_num_heads=kv_heads,
            **options,
        )
        x = graph.op("Add", x, self.linear(attended, f"{prefix}.self_attn.o_proj"), name=f"{prefix}.attended")
        normed = self.norm(x, f"{prefix}.post_attention_layernorm")
        gate, up = (self.linear(normed, f"{prefix}.mlp.{name}_proj") for name in ("gate", "up"))
        gate = graph.op("Mul", gate, graph.op("Sigmoid", gate, name=f"{gate}.sigmoid"), name=f"{gate}.silu")
        product = graph.op("Mul", gate, up, name=f"{prefix}.mlp.product")
        return graph.op("Add", x, self.linear(product, f"{prefix}.mlp.down_proj"), name=prefix)

    def positions(self) -> tuple[str, str, str, str]:
        """What attention needs beside the heads: keys of each sequence less one, of all, cosines, sines."""
        graph, rows = self.graph, self.config.max_position_embeddings
        axis, one = graph.integers("axis", 1), graph.integers("one", 1)
        length = graph.op("ReduceSum", "attention_mask", axis, name="lengths", keepdims=0)
        last = graph.op("Cast", graph.op("Sub", length, one, name="last"), name="seqlens_k", to=TensorProto.INT32)
        shape = graph.op("Shape", "attention_mask", name="mask_shape", start=1, end=2)
        total = graph.op("Cast", shape, name="total_sequence_length", to=TensorProto.INT32)
        rotary: Any = self.source.model.base_model.rotary_emb

        def table(function: Any) -> Tensor:
            angles = torch.arange(rows, dtype=torch.float32)[:, None] * rotary.inv_freq
            return function(angles) * rotary.attention_scaling

        shape_of_table = (rows, self.width // 2)
        cosines = graph.weight("cosines", torch.float32, shape_of_table, lambda: table(torch.cos))
        return last, total, cosines, graph.weight("sines", torch.float32, shape_of_table, lambda: table(torch.sin))

    def linear(self, x: str, name: str, result: str = "") -> str:
        """x W^T + bias."""
        result = result or f"{name}.y"
        bias = f"{name}.bias" if f"{name}.bias" in self.names else None
        product = f"{name}.product" if bias else result
        scheme = self.source.schemes.get(name)
        if scheme is None:
            self.dense(x, self.stored(f"{name}.weight"), product)
        else:
            m, n = self.source.linears[name]
            weight = [
                self.graph.weight(f"{name}.{leaf}", dtype, shape, partial(self._operand, name, leaf))
                for leaf, (dtype, shape) in operands.specs(m, n, scheme).items()
            ]
            options = {"bits": operands.width(scheme), "block_size": operands.block_size(scheme)}
            self.graph.op("MatMulNBits", x, *weight, name=product, domain=MICROSOFT, K=n, N=m, **options)
        return self.graph.op("Add", product, self.vector(bias), name=result) if bias else result

    def dense(self, x: str, table: str, result: str) -> str:
        """x W^T, of a weight that is not packed."""
        real = self.graph.op("Cast", table, name=f"{result}.weight.fp32", to=TensorProto.FLOAT)
        return self.graph.op(
            "MatMul", x, self.graph.op("Transpose", real, name=f"{result}.weight.T", perm=[1, 0]), name=result
        )

    def norm(self, x: str, name: str) -> str:
        gain = self.vector(f"{name}.weight")
        return self.graph.op("RMSNormalization", x, gain, name=f"{name}.y", axis=-1, epsilon=self.config.rms_norm_eps)

    def head_norm(self, x: str, name: str) -> str:
        """The norm of each head by itself."""
        split = self.graph.integers(f"{name}.split", 0, 0, -1, self.width)
        joined = self.graph.integers(f"{name}.joined", 0, 0, -1)
        heads = self.graph.op("Reshape", x, split, name=f"{name}.heads")
        return self.graph.op("Reshape", self.norm(heads, name), joined, name=f"{name}.together")

    def stored(self, name: str) -> str:
        """A tensor as the checkpoint has it."""
        info = self.source.checkpoint.tensors[self.source.stored(name)]
        return self.graph.weight(name, info.dtype, info.shape, lambda: self.source.tensors[name])

    def vector(self, name: str) -> str:
        """A gain or bias, in fp32."""
        shape = tuple(self.source.model.state_dict()[name].shape)
        return self.graph.weight(name, torch.float32, shape, lambda: self.source.tensors[name].float())

    def _operand(self, name: str, leaf: str) -> Tensor:
        return self.packed(name)[leaf]

    def _pack(self, name: str) -> dict[str, Tensor]:
        return operands.pack(self.source.read(name), self.source.schemes[name])

    def inputs(self) -> list[ValueInfoProto]:
        """Their dtypes and shapes."""
        ids = [("input_ids", ["batch", "new"]), ("attention_mask", ["batch", "all"])]
        given = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in ids]
        return given + self.cache("past_key_values", "past")

    def outputs(self) -> list[ValueInfoProto]:
        shape = ["batch", "new", self.config.vocab_size]
        return [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape), *self.cache("present", "all")]

    def cache(self, name: str, length: str) -> list[ValueInfoProto]:
        shape = ["batch", self.config.num_key_value_heads, length, self.width]
        return [
            helper.make_tensor_value_info(f"{name}.{i}.{kind}", TensorProto.FLOAT, shape)
            for i in range(self.config.num_hidden_layers)
            for kind in ("key", "value")
        ]
