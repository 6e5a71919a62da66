#!/usr/bin/env python3
"""Make a synthetic checkpoint of a known model family: random weights, a small trained tokenizer.

The same options give the same bytes on the same versions of torch, transformers and tokenizers. Tests use it small,
the memory benchmark large:

    python scripts/make_tiny.py /tmp/tiny --arch qwen3
    python scripts/make_tiny.py /tmp/large --layers 32 --hidden 2048 --intermediate 8192 --heads 16 --shard-mb 500
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

PROMPTS = Path(__file__).parent.parent / "llmquant" / "calibration" / "prompts"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2: unknown and padding, begin, end
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SLIDING = {"sliding_window": 32}  # short, so that a short test sees it at work
LATENT = {  # attention, and experts in all layers but the first
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2}
CHOOSING = LATENT | {"n_group": 1, "topk_group": 1, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8}
LINEAR = {  # attention without keys to remember, in every other layer
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "full_attention_interval": 2,
}
KINDS = {"layer_types": ["full_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"]}
SHARING = {  # keys and values of the first layer
    "layer_types": ["full_attention", "full_attention"],
    "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 32,
}
STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": SLIDING,
    "qwen2": {},
    "qwen3": {},
    "gemma2": SLIDING,
    "gemma3": SLIDING | {"sliding_window_pattern": 2},
    "phi3": {"original_max_position_embeddings": 2048},
    "opt": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe": {"n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v2": LATENT | {"n_group": 1, "topk_group": 1},
    "deepseek_v3": LATENT | {"n_group": 2, "topk_group": 1},
    "deepseek_v32": CHOOSING,
    "glm_moe_dsa": CHOOSING | {"indexer_types": ["full", "shared"]},
    "deepseek_v4": EXPERTS
    | {"layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"], "q_lora_rank": 32}
    | {"o_lora_rank": 32, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 2},
    "hy_v4": CHOOSING | {"indexer_types": ["full", "shared"]},
    "phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "num_experts_per_tok": 2},
    "qwen3_next": LINEAR | {"num_experts": 8, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64},
    "qwen3_5_text": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": STATE_SPACE
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 128},
    "bamba": STATE_SPACE | {"attn_layer_indices": [1]},
    "exaone_moe": {"num_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "hy_v3": {"num_experts": 8, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
    "nemotron_h": {  # experts without gates
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_shared_expert_intermediate_size": 64,
    },
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "minimax": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "mimo_v2_flash": {"n_routed_experts": 8, "num_experts_per_tok": 2, "v_head_dim": 16} | KINDS,
    "olmo_hybrid": LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "kimi_linear": CHOOSING | {"layer_types": ["linear_attention", "full_attention"]},
    "nanochat": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": SHARING
    | {"activation_sparsity_pattern": [0.95, 0.0], "vocab_size_per_layer_input": 512, "laurel_rank": 32},
    "gemma4_text": SHARING | {"global_head_dim": 16, "vocab_size_per_layer_input": 512},
}
# Those whose experts have a size of their own.
MIXTURES = (
    "qwen2_moe", "qwen3_moe", "qwen3_next", "glm4_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa",
    "kimi_linear", "deepseek_v4", "hy_v4", "exaone_moe", "hy_v3", "ernie4_5_moe", "nemotron_h",
)  # fmt: skip
MODEL_TYPE = {"gemma3": "gemma3_text"}  # the language model alone


@dataclass(frozen=True)
class Spec:
    """What to make; the sizes are those of a config.json."""

    arch: str = "llama"
    layers: int = 2
    hidden: int = 64
    intermediate: int = 128
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 512
    tied: int = 0  # 1: the output layer is the embedding
    dtype: str = "bfloat16"
    seed: int = 0
    shard_mb: int = 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the directory to write")
    for field in fields(Spec):
        choices = list(EXTRA) if field.name == "arch" else None
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, choices=choices)
    options = vars(parser.parse_args())
    make_tiny(options.pop("out"), Spec(**options))


def make_tiny(out: Path, spec: Spec) -> None:
    """Write the checkpoint of `spec` to the directory `out`."""
    random_model(spec).save_pretrained(out, max_shard_size=spec.shard_mb * 10**6)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained_tokenizer(spec.vocab),
        unk_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )
    tokenizer.save_pretrained(out)


def random_model(spec: Spec) -> PreTrainedModel:
    """Weights with the gain of a trained model; no bias is zero and no norm is one, so that a lost one shows."""
    config = family_config(spec)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(spec.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec.dtype))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def family_config(spec: Spec) -> Any:
    gain = spec.hidden**-0.5
    shape = {
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "vocab_size": spec.vocab,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": bool(spec.tied),
    }
    if spec.arch == "opt":
        family = {"ffn_dim": spec.intermediate, "word_embed_proj_dim": spec.hidden, "init_std": gain}
    elif spec.arch == "gpt_neox":
        family = {"intermediate_size": spec.intermediate, "initializer_range": gain}
    else:
        family = {
            "intermediate_size": spec.intermediate,
            "num_key_value_heads": spec.kv_heads,
            "head_dim": spec.hidden // spec.heads,
            "initializer_range": gain,
        }
    if spec.arch in MIXTURES:
        family["moe_intermediate_size"] = spec.intermediate
    if EXTRA[spec.arch].keys() >= LATENT.keys():
        family |= {"num_key_value_heads": spec.heads}
        del family["head_dim"]
    return AutoConfig.for_model(MODEL_TYPE.get(spec.arch, spec.arch), **shape, **family, **EXTRA[spec.arch])


def trained_tokenizer(vocab: int) -> Tokenizer:
    """Byte-level BPE, trained on the built-in calibration prompts; it may end below a large `vocab`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab, 4096),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompt_lines(), trainer)
    return tokenizer


def prompt_lines() -> Iterator[str]:
    for path in sorted(PROMPTS.glob("*.jsonl")):
        yield from path.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    main()
