"""Modules whose changes can be asked for, where there are too many of them to look at each."""

from typing import Any, ClassVar

from torch import nn
from torch.utils.hooks import RemovableHandle


class Noted(nn.Module):
    """Counts when another module is put into one of its kind, or somebody begins to listen to one.

    Attributes:
        changes: of all of them together: who knows what they are like has to look again.
    """

    changes: ClassVar[int] = 0

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            Noted.changes += 1

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        Noted.changes += 1
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        Noted.changes += 1
        return super().register_forward_pre_hook(*args, **kwargs)
