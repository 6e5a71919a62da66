"""A checkpoint as a conversion reads it: one linear at a time, whatever its layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import ArchitectureError, NumericsError
from llmquant.formats import FORMATS, Format, for_config
from llmquant.model.experts import routers
from llmquant.model.language import inside
from llmquant.model.shell import StoredTensors, empty_model, read_config, read_whole_config
from llmquant.runtime.loader import stored_dtype
from llmquant.scheme import Quantized, Scheme


@dataclass(frozen=True, eq=False)
class Source:
    """An open checkpoint. Linears are named as in the model.

    Attributes:
        layout: of the quantized linears, if there are any.
        schemes: of the quantized linears, in model order.
        linears: all of the model's, quantized or not, with their shapes (m, n).
        dtype: of the original model.
    """

    checkpoint: Checkpoint
    config: PretrainedConfig
    model: PreTrainedModel  # without its weights
    layout: Format
    schemes: dict[str, Scheme]
    linears: dict[str, tuple[int, int]]
    dtype: torch.dtype

    @classmethod
    def open(cls, directory: str | Path) -> "Source":
        """Open a checkpoint, quantized in any layout that we read or not at all.

        Raises:
            CheckpointError: it is quantized in another layout.
        """
        checkpoint = Checkpoint.open(directory)
        block = checkpoint.config.get("quantization_config") or {}
        config = read_config(checkpoint)
        if inside(read_whole_config(checkpoint)):
            raise ArchitectureError(f"{checkpoint.root}: has more than its language model, and is not converted")
        dtype = stored_dtype(config)  # the empty model changes it
        model = empty_model(config)
        linears = {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        layout = for_config(block) if block else FORMATS["compressed-tensors"]
        schemes = layout.read_config(block, list(linears)) if block else {}
        return cls(checkpoint, config, model, layout, schemes, linears, dtype)

    @cached_property
    def tensors(self) -> StoredTensors:
        return StoredTensors(self.model, self.checkpoint)

    @cached_property
    def routers(self) -> list[str]:
        """Modules that send tokens to experts; none of them is quantized."""
        return routers(self.model)

    @cached_property
    def prefixes(self) -> dict[str, str]:
        """The checkpoint's name of each quantized linear -> the model's."""
        found = {}
        for name, scheme in self.schemes.items():
            first = next(iter(self.layout.specs(name, *self.linears[name], scheme, torch.float32)))
            found[self.stored(first).rpartition(".")[0]] = name
        return found

    def stored(self, name: str) -> str:
        """The checkpoint's name of a tensor."""
        return self.tensors.names.stored(name)[0]

    def read(self, name: str) -> Quantized:
        """A quantized linear, with the columns of a group side by side."""
        return self.layout.unpack(name, self.tensors, *self.linears[name], self.schemes[name])

    def order(self, name: str) -> Tensor | None:
        """The column of the weight that each column of `read` is; None if they are in place."""
        return self.layout.order(name, self.tensors, self.linears[name][1], self.schemes[name])

    def kept(self) -> Iterator[str]:
        """The checkpoint's tensors that are no part of a quantized weight, in the order of their bytes."""
        for name in self.checkpoint.tensors:
            owner, _, leaf = name.rpartition(".")
            if owner not in self.prefixes or leaf == "bias":
                yield name

    def scale_dtype(self) -> torch.dtype:
        """The dtype of the model if every scale is exact in it, otherwise the first other one that will do.

        Raises:
            NumericsError: a scale is not finite.
        """
        dtypes = dict.fromkeys((self.dtype, torch.float16, torch.bfloat16, torch.float32))
        for name, scheme in self.schemes.items():
            specs = self.layout.specs(name, *self.linears[name], scheme, torch.float32)
            scales = self.tensors[next(leaf for leaf, (dtype, _) in specs.items() if dtype.is_floating_point)]
            for dtype in [dtype for dtype in dtypes if not torch.equal(scales.to(dtype).float(), scales.float())]:
                del dtypes[dtype]
        if not dtypes:
            raise NumericsError(f"{self.checkpoint.root}: scales are wider than fp32; quantize the model again")
        return next(iter(dtypes))
