"""One layer quantized by itself, all others as they are: the divergence that this causes, measured."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from llmquant.calibration.round_trip import RoundTrip
from llmquant.calibration.stream import aside
from llmquant.model.layout import Layer
from llmquant.scheme import Scheme
from llmquant.solve.methods import Choices, Problem, solve
from llmquant.solve.prediction import Trial

SEQUENCES = 4


def quantized(
    trials: Iterable[Trial], schemes: Mapping[str, Scheme | None], choices: Choices, method: str
) -> dict[str, Tensor]:
    """What takes the place of each weight, fp32 [m, n], by linear."""
    found: dict[str, Tensor] = {}
    for trial in trials:
        if scheme := schemes[next(iter(trial.weights))]:
            stacked = torch.cat(list(trial.weights.values()))
            solution = solve(Problem(stacked, scheme, choices, trial.H), method)
            rows = [len(W) for W in trial.weights.values()]
            found |= dict(zip(trial.weights, solution.weight(scheme).split(rows), strict=True))
    return found


@torch.no_grad()
def isolated_kl(trip: RoundTrip, layer: Layer, weights: Mapping[str, Tensor]) -> float:
    """Mean KL(original || changed) in nats over the tokens of a few sequences, with `weights` in the filled layer."""
    shell, stream, number = trip.shell, trip.stream, trip.layers.index(layer)
    states = list(trip.states[number])[:SEQUENCES]
    for name, weight in weights.items():
        shell.set_weight(name, weight)
    left = aside(stream.left)
    states = [forward() for forward in stream.forwards(layer, stream.module(layer), states, left)]
    for later in trip.layers[number + 1 :]:
        with shell.filled(shell.part(later.name)):
            states = [forward() for forward in stream.forwards(later, stream.module(later), states, left)]
    both = [each for pair in zip(trip.last, states, strict=False) for each in pair]
    logits = trip.logits(both)
    total = tokens = 0.0
    for original, changed, mask in zip(logits, logits, stream.masks, strict=False):
        logp, logq = original[mask].float().log_softmax(-1), changed[mask].float().log_softmax(-1)
        total += float((logp.exp() * (logp - logq)).sum(dtype=torch.float64))
        tokens += len(logp)
    return total / tokens
