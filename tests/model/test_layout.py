"""Structure derived by watching, checked family by family against what a reader of the model's code would write."""

import pytest
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from llmquant.errors import ArchitectureError
from llmquant.model.layout import Group, derive_layout

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
}


def llama_like(pre_mlp: str = "post_attention_layernorm") -> tuple[Group, ...]:
    return (
        Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
        Group(("self_attn.o_proj",), None),
        Group(("mlp.gate_proj", "mlp.up_proj"), pre_mlp),
        Group(("mlp.down_proj",), None),
    )


OPT = OPTConfig(
    hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=128, word_embed_proj_dim=64
)
BOTH_FOLDS = [("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")]
FAMILIES = [
    (LlamaConfig(**SIZES), llama_like(), BOTH_FOLDS),
    (MistralConfig(**SIZES), llama_like(), BOTH_FOLDS),
    (Qwen2Config(**SIZES), llama_like(), BOTH_FOLDS),
    (Qwen3Config(head_dim=16, **SIZES), llama_like(), BOTH_FOLDS),
    (Gemma2Config(head_dim=16, **SIZES), llama_like("pre_feedforward_layernorm"), BOTH_FOLDS),
    (Gemma3TextConfig(head_dim=16, **SIZES), llama_like("pre_feedforward_layernorm"), BOTH_FOLDS),
    (
        Phi3Config(pad_token_id=0, eos_token_id=1, **SIZES),
        (
            Group(("self_attn.qkv_proj",), "input_layernorm"),
            Group(("self_attn.o_proj",), None),
            Group(("mlp.gate_up_proj",), "post_attention_layernorm"),
            Group(("mlp.down_proj",), None),
        ),
        [("self_attn.qkv_proj", "self_attn.o_proj"), ("mlp.gate_up_proj", "mlp.down_proj")],
    ),
    (
        OPT,
        (
            Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn_layer_norm"),
            Group(("self_attn.out_proj",), None),
            Group(("fc1",), "final_layer_norm"),
            Group(("fc2",), None),
        ),
        [("self_attn.v_proj", "self_attn.out_proj"), ("fc1", "fc2")],
    ),
    (
        GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
        (
            Group(("attention.query_key_value",), "input_layernorm"),
            Group(("attention.dense",), None),
            Group(("mlp.dense_h_to_4h",), "post_attention_layernorm"),
            Group(("mlp.dense_4h_to_h",), None),
        ),
        [],
    ),
]


@pytest.mark.parametrize(("config", "groups", "folds"), FAMILIES, ids=lambda v: getattr(v, "model_type", ""))
def test_groups_norms_and_folds(
    config: PretrainedConfig, groups: tuple[Group, ...], folds: list[tuple[str, str]]
) -> None:
    layout = derive_layout(config)
    assert len(layout.layers) == 3
    for layer in layout.layers:
        full = tuple(
            Group(tuple(f"{layer.name}.{n}" for n in g.linears), g.norm and f"{layer.name}.{g.norm}") for g in groups
        )
        assert layer.groups == full
        assert list(layer.folds) == [(f"{layer.name}.{a}", f"{layer.name}.{b}") for a, b in folds]


def test_gemma_gains_are_stored_as_offsets_from_one() -> None:
    assert derive_layout(FAMILIES[4][0]).layers[0].norm_offset == 1.0
    assert derive_layout(FAMILIES[0][0]).layers[0].norm_offset == 0.0


def test_grouped_query_attention_has_no_value_fold() -> None:
    layout = derive_layout(LlamaConfig(**{**SIZES, "num_key_value_heads": 2}))
    assert [source.rpartition(".")[2] for source, _ in layout.layers[0].folds] == ["up_proj"]


def test_a_smooth_activation_lets_no_scale_through() -> None:
    config = OPTConfig.from_dict(OPT.to_dict() | {"activation_function": "gelu"})
    assert [source.rpartition(".")[2] for source, _ in derive_layout(config).layers[0].folds] == ["v_proj"]


def test_shapes_include_the_head() -> None:
    layout = derive_layout(FAMILIES[0][0])
    assert layout.shapes["lm_head"] == (128, 64)
    assert layout.shapes["model.layers.0.mlp.down_proj"] == (64, 96)
    assert "lm_head" not in layout.linears()


def test_fused_experts_are_refused_by_name() -> None:
    config = Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16, **SIZES)
    with pytest.raises(
        ArchitectureError, match=r"qwen3_moe: model\.layers\.0\.mlp\.experts\.\S+ .*belongs to no linear"
    ):
        derive_layout(config)


def test_a_model_without_decoder_layers_is_refused() -> None:
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    with pytest.raises(ArchitectureError, match="mamba"):
        derive_layout(config)
