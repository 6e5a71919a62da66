"""Memory and time of a run from shapes alone, before the first weight is read."""

import math
import time
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from llmquant.model.layout import Group, Layout
from llmquant.model.shell import Shell
from llmquant.recipe import Recipe
from llmquant.solve.train import SEQUENCES

RUNTIME_BYTES = 600_000_000  # Python, torch and transformers themselves, as measured
HESSIAN_COPIES = 7  # two sums, two means, reordered, factor, inverse factor
WEIGHT_COPIES = 5  # stacked, corrected, reordered, codes with their grid, dequantized
SOLVED = 4  # by `auto`, what a norm feeds: three candidates at the most, and once more the one that is taken
SOLVED_BYTES = 3  # of a weight of an expert until the layer is written: packed, and what the heap loses beside it
SPILL_BYTES = 2**29  # of the original model's activations: more of them go through a file


@dataclass(frozen=True)
class Estimate:
    """Peak resident memory in bytes, time in seconds, and the bytes of activations that are kept on the disk."""

    memory: int
    seconds: float
    tokens: int
    spilled: int


def estimate(recipe: Recipe, shell: Shell, layout: Layout) -> Estimate:
    """The memory is an upper bound by design; the time assumes the matrix speed measured just now."""
    tokens = recipe.calibration.samples * recipe.calibration.seq_len if recipe.calibrated else 0
    item = shell.dtype.itemsize
    outside = sum(shell.model.get_parameter(name).numel() for name in _outside(shell, layout)) * (item + 2)
    streams = 2 if recipe.solver.correction or recipe.solver.train else 1
    widest = max(layout.shapes[group.linears[0]][1] for layer in layout.layers for group in layer.groups)
    sizes = [_sizes(layout, layer.groups) for layer in layout.layers]
    # The original stream needs weights of its own, but not of experts: it has passed them before they change.
    layer_bytes = max(streams * item * dense + (item + SOLVED_BYTES) * experts for dense, experts in sizes)
    # Between layers each token is one state; inside one, the state and the input of the linear it stands before.
    one = tokens * layout.width * item
    spilled = one if streams == 2 and one >= SPILL_BYTES else 0
    by_token = len(layout.layers) * (getattr(shell.config, "hidden_size_per_layer_input", 0) or 0)  # what Gemma adds
    state = streams * (one + tokens * widest * item) - spilled + tokens * by_token * item
    solve = max(_solve_bytes(layout, group.linears) for layer in layout.layers for group in layer.groups)
    rest = solve if recipe.calibrated else item * max(dense for dense, _ in sizes)
    memory = RUNTIME_BYTES + state + max(outside, layer_bytes + rest)
    flops = sum(_layer_flops(layout, layer.groups, tokens, recipe, shell.config) for layer in layout.layers)
    return Estimate(int(memory), flops / _matrix_speed(shell.device), tokens, spilled)


def _sizes(layout: Layout, groups: tuple[Group, ...]) -> tuple[int, int]:
    """Weights of a layer's linears, and those of its experts."""
    sizes = [0, 0]
    for group in groups:
        sizes[group.expert] += sum(math.prod(layout.shapes[name]) for name in group.linears)
    return sizes[0], sizes[1]


def _outside(shell: Shell, layout: Layout) -> list[str]:
    inside = tuple(f"{layer.name}." for layer in layout.layers)
    parameters = dict(shell.model.named_parameters())
    return [name for name in shell.names if not name.startswith(inside) and name in parameters]


def _stack(layout: Layout, linears: tuple[str, ...]) -> tuple[int, int]:
    return sum(layout.shapes[name][0] for name in linears), layout.shapes[linears[0]][1]


def _solve_bytes(layout: Layout, linears: tuple[str, ...]) -> int:
    m, n = _stack(layout, linears)
    return 4 * (HESSIAN_COPIES * n * n + WEIGHT_COPIES * m * n)


def _layer_flops(
    layout: Layout, groups: tuple[Group, ...], tokens: int, recipe: Recipe, config: PretrainedConfig
) -> float:
    """Forward passes, moments, solves and training; attention itself is left out as it is small at these lengths."""
    solver = recipe.solver
    stacks = [_stack(layout, group.linears) for group in groups]
    solved = [SOLVED if recipe.method == "auto" and group.norm else 1 for group in groups]
    passes = 1 + bool(solver.correction) + 3 * solver.train * SEQUENCES * recipe.calibration.seq_len / max(tokens, 1)
    experts = sum(group.expert for group in groups) // 2  # of which each receives its share, and as many guests
    share = 2 * getattr(config, "num_experts_per_tok", 1) / max(experts, 1)
    seen = [tokens * (share if group.expert else 1.0) for group in groups]
    forward = passes * 2 * sum(k * m * n for k, (m, n) in zip(seen, stacks, strict=True))
    moments = (1 + bool(solver.correction)) * 2 * sum(k * n * n for k, (_, n) in zip(seen, stacks, strict=True))
    solve = sum(times * (2 * m * n * n + 2 * n**3) for times, (m, n) in zip(solved, stacks, strict=True))
    return forward + moments + solve


def _matrix_speed(device: torch.device, size: int = 1024) -> float:
    """Floating-point operations per second of one fp32 product, best of three."""
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading one number waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
