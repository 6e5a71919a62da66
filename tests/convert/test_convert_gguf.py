"""GGUF files: the weights that the checkpoint means under llama.cpp's names, its tokenizer, or a refusal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmquant.convert import convert
from llmquant.errors import ArchitectureError, CheckpointError, RecipeError
from llmquant.formats.gguf import halved
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.linear import QuantLinear
from llmquant.runtime.loader import load
from llmquant.scheme import Scheme
from llmquant.verify import verify_checkpoint

gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


@pytest.fixture
def made(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`made(scheme, arch)`: a quantized model and, beside it, its GGUF file in `tmp_path / "gguf"`."""

    def make(scheme: Scheme, arch: str = "llama", **options: Any) -> Path:
        source = make_checkpoint(arch=arch, hidden=128, intermediate=128, **options)
        quantize(source, tmp_path / "packed", Recipe(method="rtn", scheme=scheme))
        convert(tmp_path / "packed", tmp_path / "gguf", "gguf")
        return tmp_path / "packed"

    return make


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Metadata, tensors in fp32, types."""
    reader = gguf.GGUFReader(path)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    return facts, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def weights(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the model in fp32, packed ones as the product with unit vectors gives them."""
    model = load(directory, torch.float32)
    found = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    with torch.inference_mode():
        for name, linear in model.named_modules():
            if isinstance(linear, QuantLinear):
                bias, linear.bias = linear.bias, None
                found[f"{name}.weight"] = linear(torch.eye(linear.in_features)).T
                linear.bias = bias
    return found


@pytest.mark.parametrize(
    ("scheme", "arch", "type", "rounding"),
    [
        (Scheme(4, 32), "llama", "Q4_0", 0),
        (Scheme(4, 128), "mistral", "Q4_0", 0),
        (Scheme(4, 32, symmetric=False), "qwen3", "Q4_1", 1e-3),
        (Scheme(8, 64), "qwen2", "Q8_0", 0),
        (Scheme(3, -1), "llama", "Q4_0", 0),
    ],
)
def test_every_tensor_is_what_the_checkpoint_means(
    made: Callable[..., Path], tmp_path: Path, scheme: Scheme, arch: str, type: str, rounding: float
) -> None:
    expected = weights(made(scheme, arch))
    facts, tensors, types = read(tmp_path / "gguf" / "model.gguf")
    assert facts["general.architecture"] == {"mistral": "llama"}.get(arch, arch)
    assert list(types.values()).count(type) == 14
    checked = {"token_embd.weight", "output.weight", "output_norm.weight"}
    assert torch.equal(tensors["token_embd.weight"], expected["model.embed_tokens.weight"])
    assert torch.equal(tensors["output.weight"], expected["lm_head.weight"])
    for layer in (0, 1):
        for name, short in NAMES.items():
            for leaf in ("weight", "bias"):
                weight = expected.get(f"model.layers.{layer}.{name}.{leaf}")
                if weight is None:
                    continue
                found = tensors[f"blk.{layer}.{short}.{leaf}"]
                heads = {"attn_q": 4, "attn_k": 2}.get(short)
                if heads and arch in ("llama", "mistral"):
                    found = halved(found, heads)
                assert torch.allclose(found, weight, rtol=0, atol=(rounding + 1e-4) * float(weight.abs().max())), name
                checked.add(f"blk.{layer}.{short}.{leaf}")
    assert checked == tensors.keys()
    assert verify_checkpoint(tmp_path / "gguf") == 3


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_experts_are_one_tensor_of_a_layer(made: Callable[..., Path], tmp_path: Path, arch: str) -> None:
    expected = weights(made(Scheme(4, 32), arch, **({"kv_heads": 4} if arch == "olmoe" else {})))
    facts, tensors, types = read(tmp_path / "gguf" / "model.gguf")
    name = facts["general.architecture"]
    assert name == {"mixtral": "llama"}.get(arch, arch.replace("_", ""))
    count = facts[f"{name}.expert_count"]
    assert (count, facts[f"{name}.expert_used_count"]) == (8 if arch in ("qwen3_moe", "olmoe") else 4, 2)
    for layer in (0, 1):
        for matrix in ("gate", "up", "down"):
            prefix = f"model.layers.{layer}.mlp.experts"
            stacked = torch.stack([expected.pop(f"{prefix}.{e}.{matrix}_proj.weight") for e in range(count)])
            found = tensors[f"blk.{layer}.ffn_{matrix}_exps.weight"]
            assert types[f"blk.{layer}.ffn_{matrix}_exps.weight"] == "Q4_0"
            assert torch.allclose(found, stacked, rtol=0, atol=1e-4 * float(stacked.abs().max()))
        router = f"blk.{layer}.ffn_gate_inp.weight"
        assert types[router] == "F32"
        assert torch.equal(tensors[router], expected[f"model.layers.{layer}.mlp.gate.weight"])
    others = [name for name in expected if name.endswith((".weight", ".bias"))]
    assert len(tensors) == len(others) + 2 * 3, "each of the other tensors has its place"
    assert verify_checkpoint(tmp_path / "gguf") == 3


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False: llama.cpp computes qwen3moe otherwise"),
        ("olmoe", {"clip_qkv": 8.0, "num_attention_heads": 2}, "clip_qkv 8.0"),
        ("olmoe", {}, "num_key_value_heads 2: llama.cpp has one for each head"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "experts in all layers, this model in 1"),
    ],
)
def test_mixtures_that_llama_cpp_computes_otherwise(
    make_checkpoint: Callable[..., Path], tmp_path: Path, arch: str, change: dict[str, Any], message: str
) -> None:
    directory = Path(shutil.copytree(make_checkpoint(arch=arch), tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ArchitectureError, match=message):
        convert(directory, tmp_path / "gguf", "gguf")
    assert not (tmp_path / "gguf").exists()


def test_tied_embeddings_are_written_once(made: Callable[..., Path], tmp_path: Path) -> None:
    made(Scheme(4, 32), tied=1)
    assert "output.weight" not in read(tmp_path / "gguf" / "model.gguf")[1]


def test_metadata_and_tokenizer(made: Callable[..., Path], tmp_path: Path) -> None:
    made(Scheme(4, 32))
    facts = read(tmp_path / "gguf" / "model.gguf")[0]
    spec = json.loads((tmp_path / "packed" / "tokenizer.json").read_text())
    assert facts["tokenizer.ggml.model"] == "gpt2"
    assert facts["tokenizer.ggml.pre"] == "gpt-2"
    assert {token: i for i, token in enumerate(facts["tokenizer.ggml.tokens"])} == spec["model"]["vocab"]
    assert facts["tokenizer.ggml.merges"] == [" ".join(merge) for merge in spec["model"]["merges"]]
    assert facts["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]  # three special tokens
    assert (facts["tokenizer.ggml.bos_token_id"], facts["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert "im_start" in facts["tokenizer.chat_template"]
    sizes = {"block_count": 2, "embedding_length": 128, "feed_forward_length": 128, "vocab_size": 512,
             "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 32}  # fmt: skip
    assert {key: facts[f"llama.{key}"] for key in sizes} == sizes


def test_an_original_is_written_in_its_own_precision(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "gguf", "gguf")
    _, tensors, types = read(tmp_path / "gguf" / "model.gguf")
    assert {type for name, type in types.items() if "norm" not in name} == {"BF16"}
    expected = load(tiny_checkpoint).get_parameter("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(tensors["blk.1.ffn_down.weight"], expected.float())


def test_frequencies_that_llama_3_divides(tiny_checkpoint: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256, "rope_theta": 10000.0}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    convert(directory, tmp_path / "gguf", "gguf")
    factors = read(tmp_path / "gguf" / "model.gguf")[1]["rope_freqs.weight"]
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / factors, load(directory).model.rotary_emb.inv_freq, rtol=1e-6)
    assert float(factors.max()) == 8


def test_what_cannot_be_held_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    quantize(make_checkpoint(), tmp_path / "int8", Recipe(method="rtn", scheme=Scheme(8, 32, symmetric=False)))
    with pytest.raises(RecipeError, match="q_proj: gguf cannot hold it: its blocks of 8 bits have no zero point"):
        convert(tmp_path / "int8", tmp_path / "out", "gguf")
    with pytest.raises(ArchitectureError, match="gemma2: is not written as GGUF"):
        convert(make_checkpoint(arch="gemma2"), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_a_name_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    spec = json.loads((directory / "tokenizer.json").read_text())
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, spec["pre_tokenizer"]]}
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match="no name for Whitespace then bytes by words"):
        convert(directory, tmp_path / "out", "gguf")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        convert(directory, tmp_path / "out", "gguf")
