"""The language model inside of a checkpoint that also sees or hears: Gemma 3, Mistral Small 3.1, Qwen2.5-VL, LLaVA.

It is what we quantize and run, by text alone. What stands beside it, towers and what leads from them to it, is copied
as it is. Its tensors have other names in such a checkpoint than in a causal language model, and its modules have others
still in transformers and in servers: config.json speaks of them by patterns.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import ArchitectureError
from llmquant.model.headed import headed

# Language models that transformers builds inside of others alone, and which they are where there is nothing but text.
ALONE: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": {"model_type": "qwen2"},
    "qwen2_5_vl_text": {"model_type": "qwen2"},
    "qwen3_vl_text": {"model_type": "qwen3"},
    "qwen3_vl_moe_text": {"model_type": "qwen3_moe", "norm_topk_prob": True},
    "qwen2_5_omni_text": {"model_type": "qwen2"},
    "qwen3_omni_moe_text": {"model_type": "qwen3_moe"},
    "glm4v_text": {"model_type": "glm4"},
    "glm4v_moe_text": {"model_type": "glm4_moe"},
}
ELSEWHERE = {"mistral4": AutoModelForImageTextToText}  # where transformers lists a causal language model, if not there
HEADED = {"mistral_large4_text", "muse_glimmer_text"}  # those that get a head of ours; see `headed`
OF_IMAGES = ("mrope_section", "mrope_interleaved", "type")  # three positions for each token, which are equal for text
PLACES = ("model.language_model.", "model.text_model.")  # in the place of `model.`
THINKER = "thinker"  # of Qwen's Omni models, which also talk: that of its parts which sees, hears and writes


def language_config(config: PretrainedConfig, source: Checkpoint) -> PretrainedConfig:
    """The configuration of the language model: `config` itself, if there is nothing else.

    Raises:
        ArchitectureError: there are several, or none that transformers can build.
    """
    if not inside(config):
        return config
    try:
        text = getattr(config, f"{THINKER}_config", config).get_text_config(decoder=True)
    except ValueError as error:
        raise ArchitectureError(f"{config.model_type}: which language model is meant? {error}") from error
    if alone := ALONE.get(text.model_type):
        fields = text.to_dict() | alone
        rope = fields.get("rope_parameters") or {}
        fields["rope_parameters"] = {name: value for name, value in rope.items() if name not in OF_IMAGES}
        text = AutoConfig.for_model(**fields)
    text.dtype = text.dtype or config.dtype
    head = any(name.endswith("lm_head.weight") for name in source.tensors)
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False)) and not head
    return text


def causal_lm(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The causal language model of a configuration, with new weights; raises what `from_config` raises."""
    if config.model_type in HEADED:
        built: PreTrainedModel = headed(MODEL_MAPPING[type(config)])._from_config(config, dtype=options.get("dtype"))
        return built
    model: PreTrainedModel = ELSEWHERE.get(config.model_type, AutoModelForCausalLM).from_config(config, **options)
    return model


def inside(config: PretrainedConfig) -> bool:
    """Whether the language model is a part of a model."""
    parts = (f"{THINKER}_config", "text_config", "decoder", "generator")
    return any(getattr(config, name, None) is not None for name in parts)


def places(name: str) -> list[str]:
    """Where a checkpoint may have a tensor of the language model, if that is a part of a model."""
    inner = name.removeprefix("model.")
    found = [f"language_model.{name}", *(place + inner for place in PLACES if inner != name)]
    return [*found, f"{THINKER}.{name}"]


def own_names(stored: str) -> list[str]:
    """What a tensor of a checkpoint is called in a checkpoint of the language model alone, if it is a part of that."""
    stored = stored.removeprefix(f"{THINKER}.")
    inner = [f"model.{stored.removeprefix(place)}" for place in PLACES if stored.startswith(place)]
    return [*inner, stored.removeprefix("language_model.")]


def towers(names: Iterable[str], stored: Iterable[str]) -> tuple[str, ...]:
    """What stands beside the language model, whose tensors are `stored`: the modules that hold the tensors `names`.

    Inside of its outermost modules they must hold weights, as the layer by which DeepSeek-V3 guesses a token ahead.
    """
    own = {module for name in stored for module in _modules(name)}
    found: dict[str, bool] = {}
    for name in names:
        if tower := next((module for module in _modules(name) if module not in own), None):
            found[tower] = found.get(tower, False) or "." not in tower or name.endswith(".weight")
    return tuple(tower for tower, holds_weights in found.items() if holds_weights)


def _modules(name: str) -> Iterator[str]:
    """Those that a tensor is in, from the outermost."""
    inner = name.removeprefix(f"{THINKER}.").removeprefix("model.").split(".")[:-1]
    return accumulate(inner, "{}.{}".format)


def by_any_name(linear: str) -> str:
    """A pattern for a linear of the language model that fits wherever that stands."""
    return f"re:.*{re.escape(linear.removeprefix('model.'))}$"


def every_expert(layer: str) -> str:
    """A pattern for the linears of all experts of a layer, whatever the block that they stand in is called."""
    return rf"re:.*{re.escape(layer.removeprefix('model.'))}\.(\w+\.)*experts\.\d+\.\w+$"


def below(tower: str) -> str:
    """A pattern for a tower, which may be a linear, and for all that is in it."""
    return rf"re:.*{re.escape(tower)}(\..*)?$"
