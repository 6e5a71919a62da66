"""Small checkpoints with random weights whose language model is a part of a model that sees."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

IMAGE, PATCHES = 500, 4  # a token's id, and how many stand for an image of 28 x 28
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "initializer_range": 0.125,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EYE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
CLIP = EYE | {"model_type": "clip_vision_model", "patch_size": 14, "projection_dim": 32}
SIGLIP = EYE | {"patch_size": 14}
PIXTRAL = EYE | {"model_type": "pixtral", "patch_size": 14}
QWEN = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
LINEAR = {  # attention in the first layer
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 64,
    "rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
}
GLM = QWEN | {"image_size": 28, "patch_size": 14}
GLM_TEXT = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}
GLM_EXPERTS = EXPERTS | {"n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
MISTRAL_4 = {
    "model_type": "mistral4",
    "num_key_value_heads": 4,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
MISTRAL_LARGE_4 = MISTRAL_4 | {"model_type": "mistral_large4_text", "index_n_heads": 2, "index_head_dim": 16}
MISTRAL_LARGE_4 |= {"index_topk": 8}
GEMMA_4 = TEXT | {"global_head_dim": 16}
GEMMA_4_EXPERTS = EXPERTS | {"enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": CLIP, "image_token_index": IMAGE},
    "mistral3": {"text_config": TEXT | {"model_type": "mistral"}, "vision_config": PIXTRAL},
    "mistral3_mistral4": {"text_config": TEXT | MISTRAL_4, "vision_config": PIXTRAL},
    "mistral_large4": {"text_config": TEXT | MISTRAL_LARGE_4, "vision_config": PIXTRAL},
    "muse_glimmer": {"text_config": TEXT | {"sliding_window": 8}, "vision_config": EYE | {"patch_size": 14}},
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 8},
        "vision_config": SIGLIP,
        "mm_tokens_per_image": PATCHES,
        "image_token_id": IMAGE,
    },
    "qwen2_5_vl": {"text_config": TEXT | MROPE, "vision_config": QWEN, "tie_word_embeddings": True},
    "qwen3_vl": {"text_config": TEXT | MROPE, "vision_config": QWEN | {"deepstack_visual_indexes": [0]}},
    "smolvlm": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": SIGLIP},
    "gemma4": {"text_config": GEMMA_4, "vision_config": SIGLIP},
    "gemma4_experts": {"text_config": GEMMA_4 | GEMMA_4_EXPERTS, "vision_config": SIGLIP},
    "qwen3_vl_moe": {
        "text_config": TEXT | EXPERTS | MROPE,
        "vision_config": QWEN | {"deepstack_visual_indexes": [0]},
    },
    "glm4v": {"text_config": TEXT | GLM_TEXT, "vision_config": GLM},
    "glm4v_moe": {"text_config": TEXT | GLM_TEXT | GLM_EXPERTS, "vision_config": GLM},
    "qwen3_5_moe": {"text_config": TEXT | EXPERTS | LINEAR, "vision_config": QWEN},
}
OMNI = {
    "audio_config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    | {"output_dim": 64, "downsample_hidden_size": 32},
    "vision_config": QWEN | {"deepstack_visual_indexes": [0], "fullatt_block_indexes": [0]},
}
OMNI_TEXT = {
    "qwen2_5_omni": {"text_config": TEXT | MROPE},
    "qwen3_omni_moe": {"text_config": TEXT | EXPERTS | MROPE},
}
THINKERS = {
    "qwen2_5_omni": Qwen2_5OmniThinkerForConditionalGeneration,
    "qwen3_omni_moe": Qwen3OmniMoeThinkerForConditionalGeneration,
}
LONELY = ("gemma4_experts", "qwen3_vl_moe", "mistral3_mistral4")  # whose experts transformers does not find one by one
STACKED = (*LONELY, "qwen3_5_moe")  # published with the experts of a layer in one tensor


def make(arch: str, tokenizer: Path, out: Path) -> Path:
    """Write a checkpoint of that family to `out`, with the tokenizer of another."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        family = arch.removesuffix("_experts").removesuffix("_mistral4")
        config = AutoConfig.for_model(family, **FAMILIES[arch])
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():  # that one is lost has to show
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(out)
    if arch in STACKED:
        stack_experts(out, turned=arch == "qwen3_vl_moe")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)
    return out


def make_omni(arch: str, tokenizer: Path, out: Path) -> PreTrainedModel:
    """Of Qwen's models that also talk: the part that sees, hears and writes, which it returns, and another."""
    config = AutoConfig.for_model(arch, thinker_config=OMNI | OMNI_TEXT[arch])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        THINKERS[arch](config.thinker_config).bfloat16().save_pretrained(out)
    thinker = THINKERS[arch].from_pretrained(out, dtype=torch.float32).eval()
    tensors = {f"thinker.{name}": tensor for name, tensor in load_file(out / "model.safetensors").items()}
    save_file(tensors | {"talker.model.norm.weight": torch.ones(64)}, out / "model.safetensors", {"format": "pt"})
    config.save_pretrained(out)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)
    return thinker


def stack_experts(directory: Path, *, turned: bool = False) -> None:
    """Put the experts of each layer into two tensors, as files of Qwen3.5 have them; of Qwen3-VL they are `turned`."""
    tensors = load_file(directory / "model.safetensors")
    for block in {name.partition(".experts.")[0] for name in tensors if ".experts.0." in name}:
        count = sum(name.startswith(f"{block}.experts.") for name in tensors) // 3
        gate, up, down = (
            torch.stack([tensors.pop(f"{block}.experts.{n}.{kind}_proj.weight") for n in range(count)])
            for kind in ("gate", "up", "down")
        )
        tensors |= {f"{block}.experts.gate_up_proj": torch.cat((gate, up), 1), f"{block}.experts.down_proj": down}
    stacks = [name for name in tensors if ".experts." in name]
    assert stacks
    for name in stacks if turned else ():
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def picture() -> dict[str, torch.Tensor]:
    """One image, and text around it."""
    ids = torch.cat((torch.arange(3, 13), torch.full((PATCHES,), IMAGE), torch.arange(20, 30)))[None]
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "pixel_values": pixels}
