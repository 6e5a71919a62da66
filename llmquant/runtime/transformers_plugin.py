"""The quantizer `llmquant` of transformers: `from_pretrained` puts a QuantLinear where weights are packed.

When it is used is decided in `transformers_hook`. transformers fills the packed tensors as it fills any others, in the
place of each linear; once all are there the panels of the kernels are made of them, one linear at a time.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmquant.errors import CheckpointError, RecipeError
from llmquant.formats import Format, for_config
from llmquant.kernels.attention import use_attention
from llmquant.kernels.cpu import PLANES
from llmquant.model.experts import has_experts, unfuse
from llmquant.model.names import apart, converts_others
from llmquant.model.shell import check_finite, dtype_of
from llmquant.runtime.decode import use_decoder
from llmquant.runtime.linear import QuantLinear, Stored
from llmquant.scheme import Scheme

NAME = "llmquant"


@register_quantization_config(NAME)
class LlmquantConfig(QuantizationConfigMixin):
    """`from_pretrained(DIR, quantization_config=LlmquantConfig())`: run what DIR holds by our kernels.

    `precision` is that of products with packed weights on the CPU, "exact" or "int8"; see `llmquant.load`.
    """

    def __init__(self, precision: str = "exact") -> None:
        if precision not in PLANES:
            raise RecipeError(f"precision: {precision!r} is none; use one of {', '.join(PLANES)}")
        self.quant_method: Any = NAME
        self.precision = precision
        self.block: dict[str, Any] = {}

    def of(self, block: dict[str, Any]) -> "LlmquantConfig":
        """The same for a checkpoint whose config.json has this `quantization_config`.

        Raises:
            CheckpointError: it is in no layout that we read.
        """
        for_config(block)
        config = LlmquantConfig(self.precision)
        config.block = block
        return config

    def to_dict(self) -> dict[str, Any]:
        """What a saved config.json says: the layout of the tensors, which is what it was."""
        return deepcopy(self.block)


class _Packed(nn.Module):
    """The packed tensors of a linear while transformers fills them, under the names that the checkpoint has."""

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, scheme: Scheme, layout: Format) -> None:
        super().__init__()
        self.m, self.n = linear.weight.shape
        self.scheme, self.layout = scheme, layout
        for name, (dtype, shape) in layout.specs("", self.m, self.n, scheme, torch.float32).items():
            wide = torch.float32 if dtype.is_floating_point else dtype  # every scale is exact in it
            self.register_buffer(name.removeprefix("."), torch.empty(shape, dtype=wide, device="meta"))
        self.register_parameter("bias", linear.bias)
        self.weight = torch.empty(self.m, self.n, device="meta")  # for models that would initialize it

    def linear(self, name: str, dtype: torch.dtype) -> QuantLinear:
        """Raises CheckpointError if a tensor was not in the checkpoint or is malformed, NumericsError if not finite."""
        tensors = _Tensors()
        for leaf, value in self._buffers.items():
            if value is not None and getattr(value, "_is_hf_initialized", False):  # set on what was read from a file
                tensors[f"{name}.{leaf}"] = value
                check_finite(value, f"{name}.{leaf}")
        q = self.layout.unpack(name, tensors, self.m, self.n, self.scheme)
        order = self.layout.order(name, tensors, self.n, self.scheme)
        return QuantLinear.from_quantized(q, self.scheme, self.bias, Stored(self.layout, self.scheme, dtype), order)


class _Tensors(dict[str, torch.Tensor]):
    """Tensors that were in the checkpoint."""

    def __missing__(self, name: str) -> torch.Tensor:
        raise CheckpointError(f"tensor {name} is missing from every shard; fetch the checkpoint again")


@register_quantizer(NAME)
class LlmquantQuantizer(HfQuantizer):
    """Loads and saves; there is nothing to quantize or to train here."""

    requires_calibration = True  # transformers' word for: a checkpoint has to be packed already
    quantization_config: LlmquantConfig
    _apart = False  # experts are linears, as they are in files
    _dtype: torch.dtype | None = None  # that was asked for

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype
        return dtype

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        if isinstance(device_map, Mapping) and len(set(device_map.values())) > 1 and _offloads(device_map):
            raise RecipeError("device_map: packed weights cannot be offloaded; name one device, or GPUs only")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise RecipeError("tp_plan: transformers cannot split packed weights; use vLLM for tensor parallelism")
        layout = for_config(self.quantization_config.block)
        unfuse(model)
        if has_experts(model):
            if not hasattr(HfQuantizer, "update_weight_conversions"):
                raise RecipeError(
                    f"transformers {transformers.__version__} loads no packed experts; install 5.8 or newer"
                )
            self._apart = True
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for name, scheme in layout.read_config(self.quantization_config.block, list(linears)).items():
            model.set_submodule(name, _Packed(linears[name], scheme, layout))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, parameter in model.named_parameters():  # older ones of transformers leave what they rename as it is
            if self._dtype is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype_of(name, model, self._dtype))
        packed = {name: module for name, module in model.named_modules() if isinstance(module, _Packed)}
        for name in list(packed):
            linear = packed.pop(name).linear(name, model.dtype)
            linear.precision = self.quantization_config.precision
            model.set_submodule(name, linear)
        if all(parameter.device.type == "cpu" for parameter in model.parameters()):
            use_attention(model)
            use_decoder(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Where experts stay apart, all but what would fuse them."""
        rules = list(weight_conversions)
        return [*apart(rules), *filter(converts_others, rules)] if self._apart else rules

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return True


def _offloads(device_map: Mapping[str, Any]) -> bool:
    return any(str(device) in ("cpu", "disk") for device in device_map.values())
