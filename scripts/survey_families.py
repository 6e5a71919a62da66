#!/usr/bin/env python3
"""Which decoder families of the installed transformers go through, each on a small model with random weights.

The original is loaded and compared with what transformers loads; quantized by the default method in groups of 32,
verified and loaded again; it has to write token by token what it computes at once; and, with --client, transformers
and compressed-tensors in another environment compute logits from the files, without llmquant.

    python scripts/survey_families.py --client .venv-clients/bin/python

prints the table of docs/families.md; families can be named.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from make_tiny import Spec, make_tiny
from rich.console import Console
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmquant import Recipe, load, quantize, verify_checkpoint

# Encoders, decoders of other encoders, what makes no text, and what no few numbers make small.
OTHERS = set(
    "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small blt camembert data2vec-text "
    "electra emu3 ernie fuyu gemma4_assistant gemma4_unified_assistant git got_ocr2 marian mbart megatron-bert "
    "mllama moshi moss_transcribe_diarize musicgen musicgen_melody mvp pegasus plbart prophetnet reformer rembert "
    "roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod".split()
)
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "n_embed", "dim", "word_embed_proj_dim", "embedding_size"), 64
    ),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "hidden_size_per_layer_input"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size", "sliding_window"), 16),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "index_topk"), 8),
    **dict.fromkeys(("num_experts_per_tok", "eos_token_id"), 2),
    **dict.fromkeys(("n_group", "topk_group", "bos_token_id", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 512),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 2048),
    **dict.fromkeys(("initializer_range", "init_std"), 0.125),
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LATENT = {"num_key_value_heads": 4, "head_dim": None}  # attention has no head_dim of its own there
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
SHORT = {"layer_types": ["conv", "full_attention"]}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys("deepseek_v2 deepseek_v3 deepseek_v32 glm_moe_dsa glm4_moe_lite youtu axk1 axk2".split(), LATENT),
    **dict.fromkeys(("sarvam_mla", "minicpm3", "longcat_flash"), LATENT),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "lara_mini"), LINEAR),
    **dict.fromkeys(("lfm2_moe", "lfm3"), SHORT),
    "kimi_linear": LATENT | LINEAR,
    "bailing_hybrid": LATENT | LINEAR | {"num_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0], "laurel_rank": 32,
    },
    "gemma4_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "falcon_h1": {"mamba_d_ssm": 128},
    "xlstm": {"hidden_size": 128, "num_blocks": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
}  # fmt: skip
IDS = torch.randint(3, 512, (2, 48), generator=torch.Generator().manual_seed(1))
CLIENT = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits.float(), sys.argv[3])
"""


@dataclass
class Row:
    """What became of a family; the last step that was reached stands in `failed`, with the reason, if it did."""

    family: str
    loaded: float | None = None  # largest difference of logits from transformers', of their largest
    kl: float | None = None  # nats, of the quantized model from the original
    written: bool | None = None  # token by token as at once
    client: float | str | None = None  # as `loaded`, of the quantized model; or what transformers says
    failed: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; all if not given")
    parser.add_argument("--client", type=Path, help="a Python with transformers and compressed-tensors")
    options = parser.parse_args()
    if unknown := [family for family in options.families if family not in CONFIG_MAPPING]:
        parser.error(f"transformers {transformers.__version__} has no family {unknown[0]!r}")
    if options.client and not options.client.is_file():
        parser.error(f"--client {options.client}: is no Python; give the path of one")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    families = options.families or sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - OTHERS)
    seen: set[str] = set()
    for family in families:
        with tempfile.TemporaryDirectory() as work:
            row = survey(family, Path(work), options.client)
        if row.family not in seen:
            seen.add(row.family)
            Console(soft_wrap=True).print(line(row), markup=False, highlight=False)


def survey(family: str, work: Path, client: Path | None) -> Row:
    row, step = Row(family), "its default configuration"
    try:
        config = small(family)
        row.family, step = config.model_type, "a small one"
        original = make(config, work)
        step = "transformers loads what it wrote"
        expected = logits(AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval())
        step = "load"
        ours = load(original, torch.float32)
        row.loaded = apart(logits(ours), expected)
        step = "quantize"
        quantize(original, work / "packed", recipe(work))
        step = "verify"
        verify_checkpoint(work / "packed")
        step = "load, packed"
        packed = load(work / "packed", torch.float32)
        found = logits(packed)
        row.kl = divergence(logits(ours), found)
        step = "generate"
        row.written = writes_the_same(packed)
        step = "ask transformers"
        row.client = ask(client, work, found) if client else None
    except Exception as error:  # whatever it is, it is what the table is for
        reason = str(error).splitlines()[0] if str(error) else ""
        row.failed = f"{step}: {type(error).__name__}: {reason}".replace(str(work), "")
    return row


def small(family: str) -> PretrainedConfig:
    """Its language model's configuration, with sizes of ours."""
    kind = CONFIG_MAPPING[family]
    try:
        config = kind().get_text_config(decoder=True)
    except Exception:  # its own defaults may not fit each other
        config = kind(**{name: size for name, size in SIZES.items() if name in kind.__annotations__})
    known = {*config.to_dict()} - {*config.attribute_map}
    sizes = {name: size for name, size in SIZES.items() if name in known} | OWN.get(config.model_type, {})
    return AutoConfig.for_model(config.model_type, **{name: size for name, size in sizes.items() if size is not None})


def make(config: PretrainedConfig, work: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # that one is lost has to show
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(work / "original")
    make_tiny(work / "other", Spec())
    AutoTokenizer.from_pretrained(work / "other").save_pretrained(work / "original")
    return work / "original"


def recipe(work: Path) -> Recipe:
    rows = torch.randint(3, 512, (12, 48), generator=torch.Generator().manual_seed(0)).tolist()
    (work / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    calibration = {"source": str(work / "ids.jsonl"), "samples": 12, "seq_len": 48}
    return Recipe.from_dict({"scheme": {"group_size": 32}, "calibration": calibration})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(IDS).logits.float()
    return out


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def divergence(expected: Tensor, found: Tensor) -> float:
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def writes_the_same(model: Any) -> bool:
    written = model.generate(IDS[:1, :24], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    whole = model(written, use_cache=False).logits[0, 23:-1]
    whole[:, SIZES["eos_token_id"]] = -torch.inf  # which the least of new tokens rules out
    return torch.equal(whole.argmax(-1), written[0, 24:])


def ask(client: Path, work: Path, expected: Tensor) -> float | str:
    """How far transformers' logits are from ours, or the end of what it says."""
    torch.save(IDS, work / "ids.pt")
    paths = [str(work / name) for name in ("packed", "ids.pt", "logits.pt")]
    done = subprocess.run([str(client), "-c", CLIENT, *paths], capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return apart(torch.load(work / "logits.pt"), expected)


def line(row: Row) -> str:
    """Of a table in Markdown."""
    if row.failed:
        return f"| {row.family} | {row.failed} | | | |"
    client = f"{row.client:.0e}" if isinstance(row.client, float) else row.client or ""
    return f"| {row.family} | {row.loaded:.0e} | {row.kl:.3f} | {'yes' if row.written else 'no'} | {client} |"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
