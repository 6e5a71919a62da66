"""Trained rounding: gradients move codes and scales towards the layer's output in the original model.

(After SignRound, Cheng et al., arXiv 2309.05516, whose V it is. Started here from codes that are solved, most signs are
noise: each step follows the gradient's size within its row and not its sign, see docs/accuracy.md.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.scheme import Quantized, Scheme, dequantize
from llmquant.solve.grid import representable

SEQUENCES = 4  # of each step
EDGE = 0.499  # of a code: half a step, less what rounding could take for more
RATE = 0.0005  # of a code, for the mean gradient of a row, in the first step; it falls to zero with the last
SCALE_RATE = 0.1  # of the codes' rate: a scale moves all codes of its group

Forward = Callable[[dict[str, Tensor], int], Tensor]  # weights [m, n] by linear, and a batch: its output [B, T, hidden]


@dataclass
class _Variables:
    """A linear's integers with room to move: codes round(c + V) in [0, 2^bits), scales s (1 + b).

    V starts where the weight itself is, if that rounds to the solved code, or at the edge on its side.
    """

    start: Quantized
    scheme: Scheme
    V: Tensor
    b: Tensor

    @classmethod
    def of(cls, q: Quantized, scheme: Scheme, W: Tensor) -> "_Variables":
        width = scheme.width(W.shape[1])
        exact = W / q.scales.repeat_interleave(width, 1) + q.zeros.repeat_interleave(width, 1)
        return cls(q, scheme, (exact - q.codes).clamp_(-EDGE, EDGE), torch.zeros_like(q.scales))

    def quantized(self) -> Quantized:
        codes = (self.start.codes + self.V).round_().clamp_(0, self.scheme.max_code)
        scales = representable(self.start.scales * (1 + self.b))
        return self.start._replace(codes=codes.to(torch.uint8), scales=scales)

    def step(self, gradient: Tensor, rate: float) -> None:
        """Against the gradients of V and b: that of the weight, passed straight through the rounding."""
        q = self.quantized()
        integers = dequantize(q._replace(scales=torch.ones_like(q.scales)), self.scheme)
        width = self.scheme.width(gradient.shape[1])
        by_scale = (gradient * integers).view(*q.scales.shape, width).sum(-1) * self.start.scales
        by_code = gradient * q.scales.repeat_interleave(width, 1)
        self.V.sub_(_of_mean_size_one(by_code), alpha=rate).clamp_(-1, 1)
        self.b.sub_(_of_mean_size_one(by_scale), alpha=rate * SCALE_RATE)


def train_rounding(
    forward: Forward,
    targets: Sequence[Tensor],
    masks: Sequence[Tensor],
    held_out: set[int],
    quantized: dict[str, tuple[Quantized, Scheme, Tensor]],
    *,
    iterations: int,
    dtype: torch.dtype,
    seed: int,
) -> tuple[dict[str, Quantized], float, float]:
    """Refine the integers of one layer; they are kept only if the error falls on the batches held out.

    The loss of a token is the squared error of the layer's output over its squared size, because the next norm divides
    by that size. Returns the integers, and the held-out loss before and after.

    Args:
        targets: the layer's outputs in the original model, [B, T, hidden] for each batch.
        masks: bool [B, T], False where padded.
        quantized: by linear, its integers, their scheme and the weight that they stand for, fp32 [m, n].
        dtype: of the weights that `forward` takes.
    """
    variables = {name: _Variables.of(*each) for name, each in quantized.items()}
    seen = [i for i in range(len(targets)) if i not in held_out]
    generator = torch.Generator().manual_seed(seed)
    before = _held_out_loss(forward, targets, masks, held_out, variables, dtype)
    for iteration in range(iterations):
        weights = {
            name: dequantize(v.quantized(), v.scheme).to(dtype).requires_grad_() for name, v in variables.items()
        }
        for pick in torch.randperm(len(seen), generator=generator)[:SEQUENCES].tolist():
            i = seen[pick]
            with torch.enable_grad():
                token_loss(forward(weights, i), targets[i], masks[i]).backward()
        rate = RATE * (1 - iteration / iterations)
        for name, v in variables.items():
            gradient = weights[name].grad
            if gradient is not None:
                v.step(gradient.float(), rate)
    after = _held_out_loss(forward, targets, masks, held_out, variables, dtype)
    if not after < before:
        return {name: q for name, (q, *_) in quantized.items()}, before, before
    return {name: v.quantized() for name, v in variables.items()}, before, after


def _of_mean_size_one(gradient: Tensor) -> Tensor:
    """Each row by its own mean magnitude: rows are problems of very different size."""
    return gradient / gradient.abs().mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def _held_out_loss(
    forward: Forward,
    targets: Sequence[Tensor],
    masks: Sequence[Tensor],
    held_out: set[int],
    variables: dict[str, _Variables],
    dtype: torch.dtype,
) -> float:
    weights = {name: dequantize(v.quantized(), v.scheme).to(dtype) for name, v in variables.items()}
    losses = [float(token_loss(forward(weights, i), targets[i], masks[i])) for i in sorted(held_out)]
    return sum(losses) / len(losses)


def token_loss(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that count of ||output - target||^2 / ||target||^2."""
    error = (output.float() - target.float()).square().sum(-1) / target.float().square().sum(-1).clamp(min=1e-20)
    mask = mask.to(error.device)
    return (error[mask] if error.shape[:2] == mask.shape else error[..., mask]).mean()
