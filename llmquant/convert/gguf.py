"""A model as one GGUF file for llama.cpp, with the integers that the checkpoint holds; the rest stays as it is.

Tensors carry llama.cpp's names, and rows of q and k lie in the order in which it rotates them, where its model of the
family rotates neighbours. A checkpoint that is not quantized becomes a file in its own precision.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from llmquant.checkpoint import durable
from llmquant.convert.product import Product, side_files
from llmquant.convert.source import Source
from llmquant.convert.vocabulary import add_tokenizer
from llmquant.errors import ArchitectureError, RecipeError
from llmquant.formats import gguf as blocks
from llmquant.formats.checks import check_in_place
from llmquant.model.experts import Experts
from llmquant.model.names import tied_names
from llmquant.scheme import Quantized

FILE = "model.gguf"
ALIGNMENT = 32  # bytes, of the beginning of each tensor
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
EXPERT = re.compile(r"\.experts\.\d+\.")


class Family(NamedTuple):
    """What llama.cpp calls a model type, and how it computes that.

    Attributes:
        interleaved: it rotates neighbours in q and k.
        normalized: the weights of a token's experts add up to one; None where the model's configuration cannot differ.
    """

    name: str
    interleaved: bool
    normalized: bool | None = None


FAMILIES = {
    "llama": Family("llama", True),
    "mistral": Family("llama", True),
    "qwen2": Family("qwen2", False),
    "qwen3": Family("qwen3", False),
    "mixtral": Family("llama", True),
    "qwen2_moe": Family("qwen2moe", False, normalized=False),
    "qwen3_moe": Family("qwen3moe", False, normalized=True),
    "olmoe": Family("olmoe", False, normalized=False),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its elements, their type, and what makes their bytes."""

    shape: tuple[int, ...]
    type: str  # of GGMLQuantizationType
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        return int(np.prod(self.shape)) // block * size


def product(source: Source) -> Product:
    """The file, and what llama.cpp makes otherwise than the model.

    Raises:
        ArchitectureError: the model is of no family that is written here.
        RecipeError: a linear that blocks of 32 columns cannot hold, or act-order.
        CheckpointError: a tokenizer that llama.cpp has no name for.
    """
    kind = source.config.model_type
    if kind not in FAMILIES:
        raise ArchitectureError(f"{kind}: is not written as GGUF; models of {', '.join(FAMILIES)} are")
    _check_mixture(source, FAMILIES[kind])
    for name, scheme in source.schemes.items():
        if reason := blocks.refuse(*source.linears[name], scheme):
            raise RecipeError(f"{name}: gguf cannot hold it: {reason}")
        check_in_place(name, source.order(name), "gguf")
    entries = _entries(source, FAMILIES[kind])
    head = _head(source, FAMILIES[kind], entries)
    licences = {name: write for name, write in side_files(source).items() if name.startswith(("LICENSE", "NOTICE"))}
    return Product({**licences, FILE: partial(_write, head, entries)}, _notes(source, entries))


def _check_mixture(source: Source, family: Family) -> None:
    """Refuse what llama.cpp computes otherwise than the model."""
    config, experts = source.config, sum(isinstance(module, Experts) for module in source.model.modules())
    if family.normalized is not None and config.norm_topk_prob != family.normalized:
        raise ArchitectureError(f"norm_topk_prob {config.norm_topk_prob}: llama.cpp computes {family.name} otherwise")
    if config.model_type == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        raise ArchitectureError(f"num_key_value_heads {config.num_key_value_heads}: llama.cpp has one for each head")
    if getattr(config, "clip_qkv", None):
        raise ArchitectureError(f"clip_qkv {config.clip_qkv}: is not written as GGUF")
    if experts not in (0, config.num_hidden_layers):
        raise ArchitectureError(f"{config.model_type}: llama.cpp has experts in all layers, this model in {experts}")


def _write(head: bytes, entries: dict[str, Entry], path: Path) -> str:
    return durable.write_file(
        path, _chunks(head, entries), len(head) + sum(_padded(e.nbytes) for e in entries.values())
    )


def _chunks(head: bytes, entries: dict[str, Entry]) -> Iterator[bytes | memoryview]:
    yield head
    yield bytes(_padded(len(head)) - len(head))
    for entry in entries.values():
        yield entry.make().contiguous().flatten().view(torch.uint8).numpy().data
        yield bytes(_padded(entry.nbytes) - entry.nbytes)


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT


def _entries(source: Source, family: Family) -> dict[str, Entry]:
    """Every tensor of the model under llama.cpp's name, in the order of the model."""
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    names = gguf.get_tensor_name_map(architecture, source.config.num_hidden_layers)
    heads = {"q_proj": source.config.num_attention_heads, "k_proj": source.config.num_key_value_heads}
    entries: dict[str, Entry] = {}
    experts: dict[str, list[Entry]] = {}  # of one layer and matrix, which are one tensor
    if (factors := _rope_factors(source.config)) is not None:
        entries["rope_freqs.weight"] = Entry(tuple(factors.shape), "F32", lambda: factors)
    for name, parameter in source.model.state_dict().items():
        if name in tied_names(source.model):
            continue
        owner, _, leaf = name.rpartition(".")
        block, number = EXPERT.subn(".experts.", owner)
        stored = names.get_name(block)
        if stored is None:
            raise ArchitectureError(f"{name}: has no place in a GGUF file of {family.name}")
        rows = heads.get(owner.rpartition(".")[2]) if family.interleaved else None
        entry = _entry(source, name, tuple(parameter.shape), rows)
        if number:
            experts.setdefault(f"{stored}.{leaf}", []).append(entry)
            entry = _stacked(experts[f"{stored}.{leaf}"])
        entries[f"{stored}.{leaf}"] = entry
    return entries


def _stacked(entries: list[Entry]) -> Entry:
    """Of experts in their order, [experts, m, n]. All have one scheme, as no server could use others."""
    first = entries[0]
    if any(entry.type != first.type for entry in entries):
        raise RecipeError("experts of one layer have several schemes; gguf holds them as one tensor")
    return Entry((len(entries), *first.shape), first.type, lambda: torch.stack([entry.make() for entry in entries]))


def _entry(source: Source, name: str, shape: tuple[int, ...], heads: int | None) -> Entry:
    """One tensor; `heads`, if its rows are to be interleaved."""
    turn = partial(blocks.interleaved, heads=heads) if heads else lambda rows: rows
    linear, _, leaf = name.rpartition(".")
    if linear in source.schemes and leaf == "weight":
        scheme = source.schemes[linear]

        def packed() -> Tensor:
            codes, scales, zeros = source.read(linear)
            return blocks.pack(linear, Quantized(turn(codes), turn(scales), turn(zeros)), scheme)

        return Entry(shape, blocks.kind(scheme), packed)
    dtype = source.checkpoint.tensors[source.stored(name)].dtype
    # Norms, biases and routers are few, and llama.cpp wants them so.
    if len(shape) == 1 or dtype not in TYPES or linear in source.routers:
        dtype = torch.float32
    return Entry(shape, TYPES[dtype], lambda: turn(source.tensors[name].to(dtype)))


def _head(source: Source, family: Family, entries: dict[str, Entry]) -> bytes:
    """Everything before the tensors: metadata, tokenizer, names and places."""
    types = Counter(entry.type for entry in entries.values() if len(entry.shape) > 1)
    usual = next((type for type in blocks.SIZES if type in types), types.most_common(1)[0][0])
    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(Path(folder) / FILE, family.name)
        writer.add_type("model")
        writer.add_name(source.checkpoint.root.resolve().name)
        writer.add_file_type(LlamaFileType["ALL_F32" if usual == "F32" else f"MOSTLY_{usual}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_hyperparameters(writer, source.config)
        add_tokenizer(writer, source.checkpoint.root, source.config.vocab_size)
        for name, entry in entries.items():
            type = GGMLQuantizationType[entry.type]
            writer.add_tensor_info(name, entry.shape, np.dtype(np.float32), entry.nbytes, type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return (Path(folder) / FILE).read_bytes()


def _add_hyperparameters(writer: GGUFWriter, config: Any) -> None:
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_width)
    counts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
    if experts := next(filter(None, counts), None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if inner := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(inner)
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(shared)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope_factors(config: Any) -> Tensor | None:
    """By what Llama 3.1 divides each frequency, fp32 [head_width / 2]; None where nothing is divided."""
    rope = config.rope_parameters
    if rope["rope_type"] in ("default", "linear"):
        return None
    if rope["rope_type"] != "llama3":
        raise ArchitectureError(f"rope_type {rope['rope_type']!r}: is not written as GGUF")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wavelength = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = rope["original_max_position_embeddings"] / wavelength  # within the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as it was, 0: divided by the whole factor
    return (1 / (kept + (1 - kept) / rope["factor"])).float()


def _notes(source: Source, entries: dict[str, Entry]) -> tuple[str, ...]:
    notes = []
    if any(entry.type == "Q4_1" for entry in entries.values()):
        notes.append("Q4_1 stores scale * zero in fp16: weights can be off by up to 0.007 of a step")
    window = getattr(source.config, "sliding_window", None)
    if source.config.model_type == "mistral" and window and window < source.config.max_position_embeddings:
        notes.append(f"llama.cpp has no sliding window in this family: beyond {window} tokens it answers otherwise")
    return tuple(notes)
