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
    Qwen2MoeConfig,
    Qwen3Config,
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


def test_a_mixture_of_experts() -> None:
    """Each expert has inputs of its own; nothing folds into a norm that the router reads, too."""
    mixture = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    layout = derive_layout(Qwen2MoeConfig(shared_expert_intermediate_size=64, **mixture, **SIZES))
    layer, norm = layout.layers[1], "model.layers.1.post_attention_layernorm"
    assert layer.mixture == "model.layers.1.mlp"
    leaves = [tuple(name.removeprefix("model.layers.1.") for name in group.linears) for group in layer.groups]
    assert leaves == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        ("mlp.shared_expert.down_proj",),
        ("mlp.experts.0.gate_proj", "mlp.experts.0.up_proj"),
        ("mlp.experts.0.down_proj",),
        ("mlp.experts.1.gate_proj", "mlp.experts.1.up_proj"),
        ("mlp.experts.1.down_proj",),
    ]
    assert [group.expert for group in layer.groups] == [False] * 4 + [True] * 4
    inputs = [(group.norm, group.foldable) for group in layer.groups]
    assert inputs == [
        ("model.layers.1.input_layernorm", True),
        (None, True),
        (norm, False),
        (None, True),
        *[(norm, False), (None, True)] * 2,
    ]
    assert layout.kept[2:4] == ("model.layers.1.mlp.gate", "model.layers.1.mlp.shared_expert_gate")
    assert layout.shapes["model.layers.2.mlp.experts.1.down_proj"] == (64, 32)


def test_a_dense_layer_among_mixtures_is_one_of_its_family() -> None:
    mixture = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "mlp_only_layers": [1]}
    layers = derive_layout(Qwen2MoeConfig(**mixture, **SIZES)).layers
    assert [layer.mixture is None for layer in layers] == [False, True, False]
    assert [group.foldable for group in layers[1].groups] == [True] * 4
    assert [source.rpartition(".")[2] for source, _ in layers[1].folds] == ["v_proj", "up_proj"]


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("gpt_oss", {}, r"experts: GptOssExperts is not made of gate, up and down alone"),
        ("llama4_text", {"intermediate_size_mlp": 64}, r"belongs to no linear \(fused experts\?\)"),
    ],
)
def test_other_experts_are_refused_by_name(model_type: str, options: dict[str, int], message: str) -> None:
    config = AutoConfig.for_model(model_type, num_local_experts=4, head_dim=16, **SIZES, **options)
    with pytest.raises(ArchitectureError, match=message):
        derive_layout(config)


def test_a_model_without_linears_in_its_layers_is_refused() -> None:
    """GPT-2 has matrices the other way round."""
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=64)
    with pytest.raises(ArchitectureError, match="gpt2: cannot derive the decoder layers"):
        derive_layout(config)


def test_layers_that_pass_on_what_a_stream_does_not_hold_are_refused() -> None:
    config = AutoConfig.for_model("zaya", hidden_size=64, num_hidden_layers=4, vocab_size=128)
    with pytest.raises(ArchitectureError, match="receives more than hidden states from the layer before"):
        derive_layout(config)
