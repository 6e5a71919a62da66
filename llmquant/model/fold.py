"""Column scales of a linear, moved into the module that makes its input."""

from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.model.shell import Shell
from llmquant.scheme import MAX_SCALE, MIN_SCALE, Quantized


class NormFold(NamedTuple):
    """A norm that multiplies by (weight + offset), and the shell that holds it."""

    shell: Shell
    norm: str
    offset: float

    def settle(self, s: Tensor) -> Tensor:
        """The scales that the norm's stored gain can undo, near those wanted; fp32 [n]."""
        gain = self._parameter("weight").float() + self.offset
        folded = self._stored("weight", gain / s - self.offset).float() + self.offset
        return torch.where((gain != 0) & (folded != 0), gain / folded, 1.0)

    def apply(self, s: Tensor) -> dict[str, Tensor]:
        """Divide the norm's output by settled scales; the tensors that changed, by name, as they are to be stored."""
        changed = {"weight": (self._parameter("weight").float() + self.offset) / s - self.offset}
        if f"{self.norm}.bias" in self.shell.names:
            changed["bias"] = self._parameter("bias").float() / s
        stored = {f"{self.norm}.{leaf}": self._stored(leaf, value) for leaf, value in changed.items()}
        for name, tensor in stored.items():
            self.shell.set_tensor(name, tensor)
        return stored

    def _parameter(self, leaf: str) -> Tensor:
        return self.shell.read(f"{self.norm}.{leaf}").to(self.shell.device)

    def _stored(self, leaf: str, value: Tensor) -> Tensor:
        return value.to(self.shell.stored_dtype(f"{self.norm}.{leaf}"))


class LinearFold(NamedTuple):
    """A linear that is quantized already: its last rows make the input columns."""

    shell: Shell
    linear: str
    quantized: Quantized

    def settle(self, s: Tensor) -> Tensor:
        """The scales for which every grid of the linear stays in range; fp32 [n]."""
        sizes = self.quantized.scales[-len(s) :].abs() / s.unsqueeze(1)
        return torch.where(((sizes >= MIN_SCALE) & (sizes <= MAX_SCALE)).all(1), s, 1.0)

    def apply(self, s: Tensor) -> tuple[Quantized, dict[str, Tensor]]:
        """The linear with its output divided by settled scales, and its bias, if it has one, as it is to be stored."""
        scales = self.quantized.scales.clone()
        scales[-len(s) :] /= s.unsqueeze(1)
        changed: dict[str, Tensor] = {}
        name = f"{self.linear}.bias"
        if name in self.shell.names:
            bias = self.shell.read(name).to(self.shell.device).float()
            bias[-len(s) :] /= s
            changed[name] = bias.to(self.shell.stored_dtype(name))
            self.shell.set_tensor(name, changed[name])
        return self.quantized._replace(scales=scales), changed
