"""A checkpoint in use: a transformers model whose quantized linears stay packed.

The model is built without weights and filled one tensor at a time, so that memory peaks at about its packed size.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import CheckpointError, RecipeError
from llmquant.formats import for_config
from llmquant.kernels.attention import use_attention
from llmquant.kernels.cpu import PLANES
from llmquant.model.experts import has_experts
from llmquant.model.names import renamings, tied_names
from llmquant.model.shell import StoredTensors, dtype_of, empty_model, place, read_config
from llmquant.native import release_threads
from llmquant.runtime.decode import use_decoder
from llmquant.runtime.linear import QuantLinear, Stored
from llmquant.scheme import Quantized, Scheme

GENERATION = "generation_config.json"


def load(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    precision: str = "exact",
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The causal language model of a checkpoint, quantized or not, on a device of torch and in eval mode.

    `dtype` is that of activations and of all that is not quantized; the checkpoint's own if not given.
    `precision` is that of products with packed weights on the CPU: "exact", which errs less than bf16 does, or "int8".

    Raises:
        CheckpointError: a tensor is missing, malformed or does not fit config.json.
        RecipeError: `precision` is neither.
        ArchitectureError: transformers does not know the model.
        NumericsError: a tensor holds NaN or Inf.
    """
    filling = Filling(Checkpoint.open(directory), dtype, precision, device)
    filling.fill(filling.names)
    model = filling.model
    model.tie_weights()
    use_decoder(model)
    if has_experts(model):
        vars(model)["_weight_conversions"] = renamings(model)  # by which `save_pretrained` names what it writes
    _load_generation_config(model, filling.source.root)
    release_threads()  # who computes with a model is often not the thread that has loaded it
    return model


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype of the original model, as config.json has it."""
    dtype = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


class Filling:
    """A model without weights, to be filled from its checkpoint part by part or all at once.

    Attributes:
        model: its parameters are on the meta device until they are filled.
        names: all that there is to fill: parameters and persistent buffers, without those that are tied to another.
        device: where its tensors go.
    """

    def __init__(
        self,
        source: Checkpoint,
        dtype: torch.dtype | None,
        precision: str = "exact",
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises what `load` raises, but for what is wrong with a tensor."""
        if precision not in PLANES:
            raise RecipeError(f"precision: {precision!r} is none; use one of {', '.join(PLANES)}")
        config = read_config(source)
        self.source = source
        self._stored = stored_dtype(config)  # of the original model, in which the scales are exact
        self._dtype, self._precision = dtype or self._stored, precision
        self.device = torch.device(device)
        self.model = empty_model(config, device=device)
        self.model.config.dtype = self._dtype
        use_attention(self.model)
        tied = tied_names(self.model)
        self.names = [name for name in self.model.state_dict() if name not in tied]
        self._tensors = StoredTensors(self.model, source)
        self._schemes: dict[str, Scheme] = {}
        if block := source.config.get("quantization_config"):
            self._layout = for_config(block)
            linears = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
            self._schemes = self._layout.read_config(block, linears)
            self.model.config.quantization_config = block  # for save_pretrained

    def fill(self, names: Iterable[str]) -> None:
        """Put the tensors `names` in their places, and a QuantLinear in that of each linear that is quantized."""
        for name in names:
            linear = name.removesuffix(".weight")
            if linear in self._schemes:
                self._quantize(linear)
            else:
                _place(self.model, name, self._tensors[name].to(self.device), dtype_of(name, self.model, self._dtype))

    @contextmanager
    def filled(self, names: list[str]) -> Iterator[None]:
        """Hold the tensors `names` for the length of a `with` block."""
        try:
            self.fill(names)
            yield
        finally:
            for name in names:
                owner, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(owner)
                if isinstance(module, QuantLinear):
                    module.to("meta")
                else:
                    place(self.model, name, getattr(module, leaf).to("meta"))

    def nbytes(self, names: Iterable[str]) -> int:
        """The memory that these tensors will take."""
        total = 0.0
        for name in names:
            owner, _, leaf = name.rpartition(".")
            tensor = getattr(self.model.get_submodule(owner), leaf)
            scheme = self._schemes.get(owner) if leaf == "weight" else None
            if scheme is None:
                total += tensor.numel() * self._dtype.itemsize
            else:
                m, n = tensor.shape
                total += m * n * (1.0 if scheme.bits == 8 else 0.5) + 8 * m * scheme.groups(n)
        return int(total)

    def part(self, prefix: str) -> list[str]:
        """Names of the tensors below a module."""
        return [name for name in self.names if name.startswith(prefix + ".")]

    def _quantize(self, name: str) -> None:
        linear: Any = self.model.get_submodule(name)
        scheme = self._schemes[name]
        m, n = linear.out_features, linear.in_features
        q = Quantized(*(part.to(self.device) for part in self._layout.unpack(name, self._tensors, m, n, scheme)))
        order = self._layout.order(name, self._tensors, n, scheme)
        order = None if order is None else order.to(self.device)
        stored = Stored(self._layout, scheme, self._stored)
        packed = QuantLinear.from_quantized(q, scheme, linear.bias, stored, order)
        packed.precision = self._precision
        self.model.set_submodule(name, packed)


def _place(model: PreTrainedModel, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Fill a parameter or persistent buffer."""
    owner, _, leaf = name.rpartition(".")
    expected = getattr(model.get_submodule(owner), leaf)
    if tensor.shape != expected.shape:
        found = f"{tuple(tensor.shape)}, but config.json asks for {tuple(expected.shape)}"
        raise CheckpointError(f"{name}: shape {found}; fetch the checkpoint again")
    place(model, name, tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _load_generation_config(model: PreTrainedModel, root: Path) -> None:
    if not (root / GENERATION).is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(root)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{root / GENERATION}: cannot be read ({reason}); fetch it again") from error
