"""What the solvers know of a linear's inputs: second moments of the tokens they may fit, and tokens held out to judge.

Notation: inputs X^ [k, n] as the quantized model makes them, X [k, n] as the original makes them;
H = X^^T X^ / k and D = (X - X^)^T X^ / k, both [n, n].
"""

import torch
from torch import Tensor

from llmquant.errors import NumericsError

HELD_TOKENS = 512  # enough to rank by; spread over all that were held out
STRIP = 256  # columns of H computed together, from the diagonal on: what is below it follows by symmetry
TOGETHER = 2048  # tokens: products of fewer take longer, each time by the size of H


class Moments:
    """Running sums over the tokens that count, fp32 [n, n]; and tokens that are held out of them for a while.

    Products are in the precision of the activations. In bf16 that rounds each entry of them by 2^-9 at most,
    at random: far below what a few thousand tokens leave open about it, and twice to four times as fast.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu", *, compared: bool = False) -> None:
        self._H = torch.zeros(n, n, device=device)
        self._D = torch.zeros(n, n, device=device) if compared else None
        self._waiting: list[tuple[Tensor, Tensor]] = []  # for others, to be added together
        self._held: list[tuple[Tensor, Tensor]] = []
        self._weight = 0.0  # of all tokens that were added
        self.tokens = 0

    def update(self, x: Tensor, mask: Tensor | None = None, original: Tensor | None = None) -> None:
        """Add tokens `x` [..., n]; `mask` [...] is False where a token is padding.

        `original` [..., n] are the same tokens in the original model; without them, X is X^.
        """
        x = _flat(x, mask)
        self.tokens += len(x)
        self._wait(x, x if original is None else _flat(original, mask), 1.0)

    def lend(self, x: Tensor, mask: Tensor, weight: float) -> None:
        """Add tokens that the linear does not receive, as so much less of an indication; they are not counted."""
        x = _flat(x, mask) * weight**0.5
        self._wait(x, x, weight)

    def _wait(self, x: Tensor, original: Tensor, weight: float) -> None:
        self._waiting.append((x, original))
        self._weight += weight * len(x)
        if sum(len(x) for x, _ in self._waiting) >= TOGETHER:
            self._add()

    def _add(self) -> None:
        """Add what is waiting."""
        if not self._waiting:
            return
        x, original = (torch.cat(part) for part in zip(*self._waiting, strict=True))
        self._waiting = []
        for start in range(0, x.shape[1], STRIP):
            self._H[start : start + STRIP, start:] += x[:, start : start + STRIP].T @ x[:, start:]
        if self._D is not None:
            self._D += (original - x).T @ x

    def hold_out(self, x: Tensor, mask: Tensor | None = None, original: Tensor | None = None) -> None:
        """Keep tokens to measure errors on; no moment contains them before `take_in`."""
        x = _flat(x, mask)
        self._held.append((x, x if original is None else _flat(original, mask)))

    def take_in(self) -> None:
        """All has been judged: add the tokens that were held out."""
        for x, original in self._held:
            self.update(x, None, original)
        self._held = []

    @property
    def seen(self) -> bool:
        """Whether any token was added."""
        return self._weight > 0

    @property
    def held(self) -> int:
        """Tokens held out."""
        return sum(len(x) for x, _ in self._held)

    def H(self, name: str) -> Tensor:
        """H, fp32 [n, n].

        Raises:
            NumericsError: no token was seen, or an activation was NaN or Inf; `name` is the linear.
        """
        if not self._weight:
            raise NumericsError(f"{name}: no calibration token reached its input")
        self._add()
        # A NaN or Inf in x puts one on the diagonal, so n numbers speak for n * n.
        if not torch.isfinite(self._H.diagonal()).all():
            raise NumericsError(f"{name}: NaN or Inf in its input activations; check the checkpoint and its dtype")
        return (self._H.triu() + self._H.triu(1).T).div_(self._weight)

    def D(self) -> Tensor | None:
        """D, fp32 [n, n]; None where nothing was compared."""
        self._add()
        return None if self._D is None else self._D / self._weight

    def held_out(self) -> tuple[Tensor, Tensor] | None:
        """The tokens held out, X^ and X, [k, n] each; None if there are none."""
        if not any(len(x) for x, _ in self._held):
            return None
        x, original = (torch.cat(part) for part in zip(*self._held, strict=True))
        step = -(-len(x) // HELD_TOKENS)
        return x[::step], original[::step]


def _flat(x: Tensor, mask: Tensor | None) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if mask is None or bool(mask.all()) else x[mask.reshape(-1)]


def relative_error(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """||X^ (W - Q)^T||^2 / ||X^ W^T||^2 from the second moments alone: tr(E H E^T) / tr(W H W^T), E = W - Q."""
    return energy(W - Q, H) / max(energy(W, H), torch.finfo(torch.float32).tiny)


def energy(W: Tensor, H: Tensor) -> float:
    """tr(W H W^T)."""
    return float((W @ H).mul_(W).sum(dtype=torch.float64))
