"""What a checkpoint directory holds, and what quantizing it would cost. Reads headers, not weights."""

import math
from pathlib import Path
from typing import Any

import torch

from llmquant.checkpoint.reader import Checkpoint
from llmquant.estimate import estimate
from llmquant.formats import for_config
from llmquant.model.layout import Layout, derive_layout
from llmquant.model.names import Names
from llmquant.model.shell import Shell, empty_model, read_config
from llmquant.native import describe_backend, describe_gpu_backend
from llmquant.recipe import Recipe


def inspect_checkpoint(model: str | Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Facts about a checkpoint, quantized or not, as a flat dictionary.

    Raises:
        LlmquantError: the directory is not a checkpoint that can be understood.
    """
    source = Checkpoint.open(model, trust_remote_code=trust_remote_code)
    layout = derive_layout(read_config(source), trust_remote_code=trust_remote_code)
    stored = sum(info.nbytes for info in source.tensors.values())
    facts: dict[str, Any] = {
        "directory": str(source.root),
        "architecture": (source.config.get("architectures") or [layout.model_type])[0],
        "layers": len(layout.layers),
        "linears": len(layout.linears()),
        "linear_parameters": sum(m * n for m, n in map(layout.shapes.__getitem__, layout.linears())),
        "files": len(source.files),
        "bytes": stored,
    }
    block = source.config.get("quantization_config")
    return (
        facts | (_quantized(source, block, layout) if block else _cost(source, layout)) | {"kernel": describe_backend()}
    )


def inspect_runtime() -> dict[str, Any]:
    """What computes on each kind of device of this machine, and why.

    Raises:
        RecipeError: LLMQUANT_BACKEND asks for what does not exist.
    """
    facts = {"torch": torch.__version__, "cpu": describe_backend(), "cuda": describe_gpu_backend()}
    if torch.cuda.is_available():
        facts["gpus"] = ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    return facts


def _quantized(source: Checkpoint, block: dict[str, Any], layout: Layout) -> dict[str, Any]:
    form = for_config(block)
    schemes = form.read_config(block, list(layout.shapes))
    names = Names(empty_model(read_config(source)), source)
    parts = (next(iter(form.specs(name, *layout.shapes[name], schemes[name], torch.float32))) for name in schemes)
    stored = {found.rpartition(".")[0] for part in parts if (found := names.find(part))}
    packed = sum(
        info.nbytes
        for name, info in source.tensors.items()
        if name.rpartition(".")[0] in stored and not name.endswith((".bias", ".weight_shape", ".g_idx"))
    )
    weights = sum(m * n for m, n in map(layout.shapes.__getitem__, schemes))
    return {
        "quantization": block.get("quant_method"),
        "quantized_linears": len(schemes),
        "schemes": ", ".join(sorted({str(scheme) for scheme in schemes.values()})),
        "bits_per_weight": round(8 * packed / weights, 3) if weights else None,
    }


def _cost(source: Checkpoint, layout: Layout) -> dict[str, Any]:
    cost = estimate(Recipe(), Shell(source), layout)
    return {
        "quantization": None,
        "bits_per_weight": round(8 * sum(i.nbytes for i in source.tensors.values()) / _parameters(source), 3),
        "default_run_memory_bytes": cost.memory,
        "default_run_seconds": round(cost.seconds, 1),
    }


def _parameters(source: Checkpoint) -> int:
    return sum(math.prod(info.shape) for info in source.tensors.values())
