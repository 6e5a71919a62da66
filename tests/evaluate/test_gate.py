"""Gates hold or they do not, and the XML says the same."""

from pathlib import Path
from xml.etree import ElementTree as xml

import pytest

from llmquant.errors import GateError
from llmquant.evaluate.gate import gates, junit, require
from llmquant.evaluate.protocol import Request
from llmquant.evaluate.run import Evaluation, evaluate


@pytest.fixture(scope="module")
def found(make_checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    text: Path = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("A gate is open or shut. " * 400)
    request = Request(seq_len=256, max_windows=9)
    return evaluate(make_checkpoint(), text_file=text, request=request, baseline=make_checkpoint(seed=1))


def test_a_bound_is_kept_at_its_very_value(found: Evaluation):
    kl = found.divergence.mean_kl
    require(gates(found, found.increase, kl))
    with pytest.raises(GateError, match=r"--max-kl: mean KL divergence is .*, allowed is"):
        require(gates(found, None, kl * 0.999))


def test_all_that_does_not_hold_is_named(found: Evaluation):
    with pytest.raises(GateError, match=r"--max-increase: perplexity rose by .*; --max-kl") as caught:
        require(gates(found, -0.999, 0.0))
    assert caught.value.exit_code == 3
    assert gates(found, None, None) == []


def test_junit_counts_and_holds_the_figures(found: Evaluation):
    suite = xml.fromstring(junit(found, gates(found, 1e9, 0.0), 1.5))  # noqa: S314  (our own)
    assert (suite.tag, suite.get("tests"), suite.get("failures"), suite.get("time")) == ("testsuite", "2", "1", "1.500")
    kept, broken = suite.findall("testcase")
    assert kept.find("failure") is None
    assert "mean KL divergence" in broken.find("failure").get("message")
    facts = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert float(facts["perplexity"]) == found.perplexity.value
    assert float(facts["increase_low"]) <= found.increase <= float(facts["increase_high"])
    assert facts["protocol"] == str(found.perplexity.protocol)
