"""The page: complete, self-contained, escaped, readable by a machine that reads aloud, and outside of the promise."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from llmquant.errors import LlmquantError, VerifyError
from llmquant.manifest import LOG, MANIFEST, REPORT
from llmquant.pipeline import Options, quantize
from llmquant.recipe import Recipe
from llmquant.report.build import render, write_report
from llmquant.report.charts import bits_map, error_bars, outlier_map
from llmquant.report.facts import Facts, read_facts
from llmquant.verify import verify_checkpoint

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "br", "img", "hr", "input"}


@pytest.fixture(scope="module")
def finished(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers of three schemes and kept ones, calibrated, with figures beside."""
    root = tmp_path_factory.mktemp("report")
    calibration = root / "ids.jsonl"
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 512, (48,), generator=generator).tolist() for _ in range(6)]
    calibration.write_text(
        "".join(json.dumps({"input_ids": row, "src": f"part {i % 2}"}) + "\n" for i, row in enumerate(rows))
    )
    recipe = Recipe.from_dict(
        {
            "method": "gptq",
            "scheme": {"group_size": 32},
            "calibration": {"source": str(calibration), "samples": 6, "seq_len": 48},
            "overrides": [
                {"match": "re:.*[12].mlp.down_proj", "bits": 8, "group_size": -1},
                {"match": "re:.*layers.0.*", "skip": True},
            ],
        }
    )
    out = root / "model"
    quantize(make_checkpoint(layers=4), out, recipe)
    figures = {
        "perplexity": 23.4,
        "baseline_perplexity": 21.2,
        "mean_kl": 0.05,
        "top1_agreement": 0.87,
        "protocol": "windows",
    }
    (out / "llmquant_eval.json").write_text(json.dumps(figures))
    return out


class Outline(HTMLParser):
    """Tags that close, headings in order, references that lead somewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.ids += [found["id"] or ""] if "id" in found else []
        self.references += (found.get("aria-labelledby") or "").split()

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_labelled(finished: Path) -> None:
    outline = Outline(write_report(finished).read_text(encoding="utf-8"))
    assert outline.open == []
    assert outline.headings[0] == 1
    assert all(after <= before + 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.references) <= set(outline.ids)
    for tag, attributes in outline.tags:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or (attributes["role"], "aria-labelledby" in attributes) == (
                "img",
                True,
            )
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        assert tag not in ("script", "iframe", "object", "link")
        assert not {"src", "href", "onload", "onclick", "style"} & set(attributes)
    assert ("html", {"lang": "en"}) in outline.tags


def test_nothing_is_fetched(finished: Path) -> None:
    page = write_report(finished).read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import", page)
    assert "default-src 'none'" in page


def test_it_says_what_the_run_was(finished: Path) -> None:
    page = write_report(finished).read_text(encoding="utf-8")
    for words in (
        "23.40",
        "original 21.20",
        "0.0500",
        "87.00%",
        "part 0",
        "part 1",
        "int8 per-channel",
        "kept",
        "peak memory",
    ):
        assert words in page
    assert "model.layers.3.self_attn.q_proj" in page
    assert "model.layers.0.mlp.down_proj: kept" in page
    assert (finished / MANIFEST).read_text().splitlines()[0] in page
    assert "method: gptq" in page


def test_strings_of_strangers_are_escaped(finished: Path) -> None:
    facts = read_facts(finished)
    evil = '</td><script>alert("1")</script>'
    linears = tuple(replace(linear, name=evil, kind=evil, scheme=evil) for linear in facts.linears)
    head = facts.head | {
        "calibration_tokens": {evil: 5},
        "notes": [evil],
        "environment": {evil: evil},
        "origin": {"name": evil},
    }
    page = render(replace(facts, linears=linears, head=head, recipe=evil, evaluation={"protocol": evil, evil: 1.0}))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    Outline(page)


def test_equal_facts_give_equal_bytes(finished: Path) -> None:
    assert render(read_facts(finished)) == render(read_facts(finished))


def test_the_page_is_no_part_of_the_checkpoint(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(finished, copy)
    before = (copy / MANIFEST).read_bytes()
    assert REPORT.encode() not in before
    (copy / REPORT).write_text("something else")
    verify_checkpoint(copy)
    assert write_report(copy) == copy / REPORT
    verify_checkpoint(copy)
    assert (copy / MANIFEST).read_bytes() == before


def test_a_new_run_in_its_place_takes_the_old_page_away(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", Recipe.from_dict({"method": "rtn", "scheme": {"group_size": 64}})
    quantize(tiny_checkpoint, out, recipe)
    page = write_report(out).read_text(encoding="utf-8")
    assert "The method reads no text" in page
    assert "Not measured yet" in page
    quantize(tiny_checkpoint, out, recipe, Options(overwrite=True))
    assert not (out / REPORT).exists()


def test_a_directory_without_a_run_is_refused(tiny_checkpoint: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="what `llmquant quantize` finished"):
        write_report(tiny_checkpoint, out=tmp_path / "page.html")
    damaged = tmp_path / "damaged"
    shutil.copytree(finished, damaged)
    (damaged / LOG).write_bytes((damaged / LOG).read_bytes().replace(b"gptq", b"gptp", 1))
    with pytest.raises(VerifyError, match="damaged"):
        write_report(damaged)
    (tmp_path / "figures.json").write_text("[]")
    with pytest.raises(LlmquantError, match=r"figures\.json"):
        write_report(finished, tmp_path / "figures.json", tmp_path / "page.html")


def test_charts_hold_every_linear(finished: Path) -> None:
    facts = read_facts(finished)
    bits = bits_map(facts.linears, facts.layers, facts.kinds)
    assert len(bits.boxes) == len(facts.linears) == 28
    assert {box.shade for box in bits.boxes} == {"bits4 g32", "bits8 per-channel", "bits16"}
    errors, outliers = error_bars(facts.linears, facts.layers), outlier_map(facts.linears, facts.layers, facts.kinds)
    assert errors is not None
    assert outliers is not None
    assert len(errors.boxes) == 3  # of layer 0 nothing was quantized
    assert all(0 <= box.y and box.y + box.height <= errors.height for box in errors.boxes)
    assert sum(box.shade == "unknown" for box in outliers.boxes) == 7
    assert {box.shade for box in outliers.boxes} >= {"unknown", "heat7"}


def test_without_figures_there_are_no_bars(finished: Path) -> None:
    facts: Facts = read_facts(finished)
    bare = [replace(linear, error=None, outliers=None) for linear in facts.linears]
    assert error_bars(bare, facts.layers) is None
    assert outlier_map(bare, facts.layers, facts.kinds) is None


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in; install the package chromium")
@pytest.mark.parametrize("size", [(1280, 1600), (390, 1600)], ids=["desktop", "phone"])
def test_a_browser_draws_it(size: tuple[int, int], finished: Path, tmp_path: Path) -> None:
    page, picture = write_report(finished, out=tmp_path / "page.html"), tmp_path / "page.png"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    assert picture.is_file(), done.stderr
    header = picture.read_bytes()[:24]
    assert header[1:4] == b"PNG"
    assert int.from_bytes(header[16:20], "big") >= size[0]
    assert picture.stat().st_size > 30_000  # a blank page compresses to a few kilobytes
    assert "Refused to" not in done.stderr
