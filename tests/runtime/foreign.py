"""Checkpoints as other tools write them, made from the definitions of their layouts: plain loops, no code of ours."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor, from_numpy

Arrays = dict[str, np.ndarray]
AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)


def rounded(W: np.ndarray, groups: np.ndarray, *, bits: int, symmetric: bool) -> tuple[Arrays, np.ndarray]:
    """Codes [m, n], scales and zeros [m, G] of a weight [m, n], `groups` [n] of its columns; and what they mean."""
    top, G = 2**bits - 1, int(groups.max()) + 1
    scales, zeros = np.zeros((len(W), G), np.float16), np.zeros((len(W), G), np.int64)
    codes = np.zeros(W.shape, np.int64)
    for g in range(G):
        part = W[:, groups == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        span = 2 * np.maximum(-low, high) if symmetric else high - low
        scales[:, g] = span / top
        exact = scales[:, g].astype(np.float64)
        zeros[:, g] = 2 ** (bits - 1) if symmetric else np.clip(np.round(-low / exact), 1, top)
        codes[:, groups == g] = np.clip(np.round(part / exact[:, None]) + zeros[:, g, None], 0, top)
    meaning = scales[:, groups].astype(np.float32) * (codes - zeros[:, groups])
    return {"codes": codes, "scales": scales, "zeros": zeros}, meaning.astype(np.float32)


def words(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Integers [.., n] in int32 words [.., n * bits / 32], in each word's order if one is given."""
    per = 32 // bits
    out = np.zeros((*values.shape[:-1], values.shape[-1] // per), np.uint64)
    for place in range(per):
        out |= values[..., (order[place] if order else place) :: per].astype(np.uint64) << np.uint64(bits * place)
    return out.astype(np.uint32).view(np.int32)


def gptq_tensors(q: Arrays, groups: np.ndarray, bits: int, *, version: int, with_groups: bool = True) -> Arrays:
    tensors = {
        "qweight": words(q["codes"], bits).T,
        "qzeros": words(q["zeros"].T - (version == 1), bits),
        "scales": q["scales"].T,
    }
    return tensors | ({"g_idx": groups.astype(np.int32)} if with_groups else {})


def awq_tensors(q: Arrays) -> Arrays:
    return {
        "qweight": words(q["codes"].T, 4, AWQ_ROWS),
        "qzeros": words(q["zeros"].T, 4, AWQ_ROWS),
        "scales": q["scales"].T,
    }


def rewrite(
    source: Path, out: Path, block: dict[str, Any], change: Callable[[str, np.ndarray], tuple[Arrays, np.ndarray]]
) -> dict[str, Tensor]:
    """Write `source` quantized to `out`. `change(name, W)` gives the tensors of a linear and the weight they mean.

    Returns the weights by name, fp32.
    """
    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    meanings = {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        linear = name.removesuffix(".weight")
        parts, meaning = change(linear, tensors.pop(name).float().numpy())
        tensors |= {f"{linear}.{leaf}": from_numpy(np.ascontiguousarray(part)) for leaf, part in parts.items()}
        meanings[name] = from_numpy(meaning)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": block}
    (out / "config.json").write_text(json.dumps(config))
    return meanings
