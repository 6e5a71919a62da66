"""Who watches a run: is told what happens, as it happens, and changes nothing."""

from typing import Any, Protocol

from llmquant.calibration.batches import Calibration
from llmquant.plan import Plan, Unit


class Observer(Protocol):
    """What a run tells. `done` units were finished by an earlier run."""

    def planned(self, plan: Plan, calibration: Calibration | None, done: int) -> None: ...
    def solved(self, record: dict[str, Any]) -> None: ...
    def finished(self, unit: Unit) -> None: ...


class Silent:
    """The observer that says nothing."""

    def planned(self, plan: Plan, calibration: Calibration | None, done: int) -> None: ...
    def solved(self, record: dict[str, Any]) -> None: ...
    def finished(self, unit: Unit) -> None: ...
