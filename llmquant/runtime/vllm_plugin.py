"""`vllm serve DIR --quantization llmquant`: our kernels inside of vLLM, for every layout that we read.

vLLM loads this by the entry point `vllm.general_plugins` in each of its processes. Without the option it reads the
same directory by its own kernels. Each rank fills its part of the packed tensors, in which vLLM puts q, k and v (gate
and up) below one another, and then makes one QuantLinear of it.
"""

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from llmquant.errors import CheckpointError, RecipeError
from llmquant.formats import Format, for_config
from llmquant.formats.sharding import BOOKKEEPING, Axes, axes, refuse_cut
from llmquant.kernels.layout import KINDS
from llmquant.native import describe_backend
from llmquant.runtime.linear import QuantLinear
from llmquant.scheme import Scheme

NAME = "llmquant"
logger = init_logger(f"vllm.{__name__}")


def register() -> None:
    """What the entry point names; importing this module has registered everything."""


@register_quantization_config(NAME)
class LlmquantConfig(QuantizationConfig):
    """Which linears are packed and how, by the `quantization_config` of config.json."""

    def __init__(self, block: dict[str, Any]) -> None:
        super().__init__()
        if block.get("desc_act"):
            raise CheckpointError("config.json: desc_act: columns in another order cannot be split; set it to false")
        for_config(block)
        self.block = block

    @property
    def layout(self) -> Format:
        """Not kept: vLLM sends its configuration to other processes, and a module cannot be sent."""
        return for_config(self.block)

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(KINDS)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LlmquantConfig":
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Ours where it is asked for by name, and only there. CheckpointError if we cannot read the layout."""
        if user_quant != NAME:
            return None
        for_config(hf_quant_cfg)
        return NAME

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        return WeightsMapper(orig_to_new_suffix=dict.fromkeys(BOOKKEEPING))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if isinstance(layer, RoutedExperts):
            raise CheckpointError(f"{prefix}: experts are not served by llmquant; leave out --quantization llmquant")
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        parent, _, leaf = prefix.rpartition(".")
        members = self.packed_modules_mapping.get(leaf, [leaf])
        linears = [f"{parent}.{member}" if parent else member for member in members]
        schemes = self.layout.read_config(self.block, linears)
        if not schemes:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if len(schemes) < len(linears) or len(set(schemes.values())) > 1 or isinstance(layer, ParallelLMHead):
            raise CheckpointError(f"{prefix}: {', '.join(linears)} have to be packed alike to be served together")
        return LlmquantLinearMethod(self.layout, next(iter(schemes.values())), prefix)


@register_weight_loader_v2_supported_method
class LlmquantLinearMethod(LinearMethodBase):
    """The linears of one scheme that vLLM runs as one, or this rank's part of them."""

    def __init__(self, layout: Format, scheme: Scheme, prefix: str) -> None:
        self.layout, self.scheme, self.prefix = layout, scheme, prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Raises RecipeError if a group or a word would be cut."""
        self.m, self.n = sum(output_partition_sizes), input_size_per_partition
        if reason := refuse_cut(self.layout, self.scheme, output_partition_sizes, self.n, input_size):
            raise RecipeError(f"{self.prefix}: {reason}; use fewer, or quantize for them: --tensor-parallel")
        specs = self.layout.specs("", self.m, self.n, self.scheme, params_dtype)
        for name, along in axes(self.layout, self.scheme).items():
            dtype, shape = specs[name]
            wide = torch.float32 if dtype.is_floating_point else dtype  # every scale is exact in it
            parameter = _parameter(along, self.scheme.bits, torch.empty(shape, dtype=wide), extra_weight_attrs)
            layer.register_parameter(name.removeprefix("."), parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if hasattr(layer, "packed"):  # vLLM may call twice
            return
        names = list(axes(self.layout, self.scheme))
        tensors = {name: getattr(layer, name.removeprefix(".")).data for name in names}
        tensors[".weight_shape"] = torch.tensor([self.m, self.n])
        q = self.layout.unpack("", tensors, self.m, self.n, self.scheme)
        layer.packed = QuantLinear.from_quantized(q, self.scheme)
        for name in names:
            delattr(layer, name.removeprefix("."))
        logger.info_once("llmquant runs linears in %s: %s", str(self.scheme), describe_backend())

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = layer.packed(x)  # type: ignore[operator]
        return y if bias is None else y + bias


def _parameter(along: Axes, bits: int, data: Tensor, attributes: dict[str, Any]) -> BasevLLMParameter:
    """The kind of parameter that vLLM cuts along these axes."""
    given = {"data": data, "weight_loader": attributes["weight_loader"], "output_dim": along.rows}
    if along.packed is not None:
        given |= {"packed_dim": along.packed, "packed_factor": Fraction(32, bits)}
    if along.columns is None:
        return (ChannelQuantScaleParameter if along.packed is None else PackedColumnParameter)(**given)
    given["input_dim"] = along.columns
    return (GroupQuantScaleParameter if along.packed is None else PackedvLLMParameter)(**given)
