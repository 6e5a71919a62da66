"""A checkpoint in use: a transformers model whose quantized linears stay packed.

The model is built without weights and filled one tensor at a time, so that memory peaks at about its packed size.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import CheckpointError, RecipeError
from llmquant.formats import for_config
from llmquant.kernels.attention import use_attention
from llmquant.kernels.cpu import PLANES
from llmquant.model.shell import StoredTensors, empty_model, place, read_config, tied_names
from llmquant.runtime.decode import use_decoder
from llmquant.runtime.linear import QuantLinear, Stored

GENERATION = "generation_config.json"


def load(directory: str | Path, dtype: torch.dtype | None = None, precision: str = "exact") -> PreTrainedModel:
    """The causal language model of a checkpoint, quantized or not, on the CPU and in eval mode.

    `dtype` is that of activations and of all that is not quantized; the checkpoint's own if not given.
    `precision` is that of products with packed weights on the CPU: "exact", which errs less than bf16 does, or "int8".

    Raises:
        CheckpointError: a tensor is missing, malformed or does not fit config.json.
        RecipeError: `precision` is neither.
        ArchitectureError: transformers does not know the model.
        NumericsError: a tensor holds NaN or Inf.
    """
    if precision not in PLANES:
        raise RecipeError(f"precision: {precision!r} is none; use one of {', '.join(PLANES)}")
    source = Checkpoint.open(directory)
    config = read_config(source)
    stored = stored_dtype(config)
    dtype = dtype or stored
    model = empty_model(config)
    model.config.dtype = dtype
    names = [name for name in model.state_dict() if name not in tied_names(model)]
    packed = quantize_linears(model, source, stored, precision)
    tensors = StoredTensors(model, source)
    for name in names:
        if name not in packed:
            _place(model, name, tensors[name], dtype)
    model.tie_weights()
    use_attention(model)
    use_decoder(model)
    _load_generation_config(model, source.root)
    return model


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype of the original model, as config.json has it."""
    dtype = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def quantize_linears(model: PreTrainedModel, source: Checkpoint, dtype: torch.dtype, precision: str) -> set[str]:
    """Put a QuantLinear in the place of each linear that is quantized; the names of the weights they replace.

    `dtype` is that of the original model, in which the scales are exact.
    """
    block = source.config.get("quantization_config")
    if not block:
        return set()
    layout = for_config(block)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    schemes = layout.read_config(block, list(linears))
    tensors = StoredTensors(model, source)
    for name, scheme in schemes.items():
        m, n = linears[name].weight.shape
        q = layout.unpack(name, tensors, m, n, scheme)
        order = layout.order(name, tensors, n, scheme)
        linear = QuantLinear.from_quantized(q, scheme, linears[name].bias, Stored(layout, scheme, dtype), order)
        linear.precision = precision
        model.set_submodule(name, linear)
    model.config.quantization_config = block  # for save_pretrained
    return {f"{name}.weight" for name in schemes}


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
