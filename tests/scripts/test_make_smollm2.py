"""From a GGUF file back to the checkpoint that it was made from."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_smollm2.py"
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def original(make_checkpoint) -> Path:
    return make_checkpoint(tied=1)


@pytest.fixture(scope="module")
def rebuilt(original, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(original, folder / "model.gguf")
    arguments = [folder / "out", "--gguf", folder / "model.gguf"]
    subprocess.run([sys.executable, SCRIPT, *arguments], check=True, stdout=subprocess.DEVNULL)
    return folder / "out"


def test_weights_come_back_bit_for_bit(original, rebuilt):
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (original, rebuilt))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name


def test_the_model_says_the_same(original, rebuilt):
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (original, rebuilt))
    assert torch.equal(before, after)


def test_tokenizer_comes_back_with_digits_apart(original, rebuilt):
    before, after = (AutoTokenizer.from_pretrained(path) for path in (original, rebuilt))
    words = "The cat and the dog: é 日本.\n"
    assert after.encode(words) == before.encode(words)
    assert after.decode(after.encode(words)) == words
    assert after.encode("12") == [*after.encode("1"), *after.encode("2")]
    message = [{"role": "user", "content": "Hi"}]
    assert after.apply_chat_template(message, tokenize=False) == before.apply_chat_template(message, tokenize=False)
    assert after.all_special_tokens == before.all_special_tokens
    assert after.encode("<|im_start|>") == [1]


def write_gguf(source: Path, target: Path) -> None:
    """The checkpoint as llama.cpp would store it, weights in fp32."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    add_tokenizer(writer, source)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, weight in AutoModelForCausalLM.from_pretrained(source).model.state_dict(prefix="model.").items():
        values = weight.float().numpy()
        module = name.removesuffix(".weight")
        prefix = ""
        if module.startswith("model.layers."):
            layer, module = module.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{layer}."
        kind = GGUF_NAMES[module]
        writer.add_tensor(f"{prefix}{kind}.weight", interleaved(values, heads[kind]) if kind in heads else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, source: Path) -> None:
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token.startswith("<|") else normal for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template(AutoTokenizer.from_pretrained(source).chat_template)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours where transformers rotates halves: row i of a half becomes row 2 i of the head."""
    out = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        for half in range(2):
            for i in range(size // 2):
                out[head * size + 2 * i + half] = weight[head * size + half * size // 2 + i]
    return out
