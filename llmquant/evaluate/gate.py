"""Quality gates: bounds that a measured checkpoint keeps or not, and a report of them that CI systems read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as xml

from llmquant.errors import GateError
from llmquant.evaluate.run import Evaluation


@dataclass(frozen=True)
class Gate:
    """One bound and what was measured."""

    option: str
    measured: float
    bound: float
    words: str

    @property
    def held(self) -> bool:
        return self.measured <= self.bound

    def __str__(self) -> str:
        return f"{self.option}: {self.words}"


def gates(found: Evaluation, max_increase: float | None, max_kl: float | None) -> list[Gate]:
    """The gates that were asked for; both need a baseline."""
    asked = []
    if max_increase is not None and found.increase is not None:
        words = f"perplexity rose by {found.increase:.2%}, allowed is {max_increase:.2%}"
        asked.append(Gate("--max-increase", found.increase, max_increase, words))
    if max_kl is not None and found.divergence is not None:
        kl = found.divergence.mean_kl
        asked.append(Gate("--max-kl", kl, max_kl, f"mean KL divergence is {kl:.4g}, allowed is {max_kl:.4g}"))
    return asked


def require(asked: Sequence[Gate]) -> None:
    """Raise GateError, naming all that do not hold."""
    if broken := [str(gate) for gate in asked if not gate.held]:
        raise GateError("; ".join(broken))


def junit(found: Evaluation, asked: Sequence[Gate], seconds: float) -> bytes:
    """JUnit XML: a test case for each gate, and all figures as properties."""
    failures = sum(not gate.held for gate in asked)
    suite = xml.Element(
        "testsuite",
        name=f"llmquant eval {found.directory}",
        tests=str(len(asked)),
        failures=str(failures),
        errors="0",
        time=f"{seconds:.3f}",
    )
    properties = xml.SubElement(suite, "properties")
    for name, value in _flat(found.to_dict()).items():
        xml.SubElement(properties, "property", name=name, value=str(value))
    for gate in asked:
        case = xml.SubElement(suite, "testcase", classname="llmquant.eval", name=gate.option, time="0")
        if not gate.held:
            xml.SubElement(case, "failure", message=gate.words, type="GateError").text = str(found.perplexity.protocol)
    xml.indent(suite)
    return xml.tostring(suite, encoding="utf-8", xml_declaration=True) + b"\n"


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """A figure's interval as two figures beside it."""
    ends = facts.pop("intervals")
    between = {f"{name}_{end}": value for name, pair in ends.items() for end, value in zip(("low", "high"), pair)}  # noqa: B905
    return facts | between
