"""A committed unit survives every kill, a torn tail is dropped, anything else that is wrong is refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmquant.errors
from llmquant.checkpoint.journal import WORK, Journal
from llmquant.errors import NumericsError, OutputError

PRINT = {"recipe": {"bits": 4, "method": "gptq"}, "input": {"files": {"a": 1}}, "seed": 0}
RECORDS = [{"unit": f"layer.{i}", "loss": 0.1 + i, "shards": {f"{i}.safetensors": "ab" * 32}} for i in range(3)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


@pytest.fixture
def written(out: Path) -> Path:
    """The path of a journal with three committed units."""
    with Journal.open(out, PRINT, resume=True) as journal:
        for record in RECORDS:
            journal.commit(record)
    return out / WORK / "journal.jsonl"


def resumed(out: Path, fingerprint: dict[str, Any] = PRINT) -> list[dict[str, Any]]:
    with Journal.open(out, fingerprint, resume=True) as journal:
        return journal.records


def test_records_come_back(written: Path, out: Path) -> None:
    assert resumed(out) == RECORDS
    assert resumed(out) == RECORDS  # reading changes nothing


def test_fingerprint_is_durable_before_the_first_unit(out: Path) -> None:
    with Journal.open(out, PRINT, resume=True) as journal:
        assert journal.records == []
        assert len((out / WORK / "journal.jsonl").read_bytes().splitlines()) == 1


def test_commits_go_on_after_a_resume(written: Path, out: Path) -> None:
    with Journal.open(out, PRINT, resume=True) as journal:
        journal.commit({"unit": "layer.3"})
        assert [record["unit"] for record in journal.records] == [f"layer.{i}" for i in range(4)]
    assert [record["unit"] for record in resumed(out)] == [f"layer.{i}" for i in range(4)]


def test_equal_runs_have_equal_journals(written: Path, out: Path, tmp_path: Path) -> None:
    with Journal.open(tmp_path / "other", dict(reversed(PRINT.items())), resume=True) as journal:
        for record in RECORDS:
            journal.commit(dict(reversed(record.items())))
    assert (tmp_path / "other" / WORK / "journal.jsonl").read_bytes() == written.read_bytes()


def test_no_resume_starts_anew_without_the_old_parts(written: Path, out: Path) -> None:
    (out / WORK / "part-00001.safetensors").write_bytes(b"x")
    (out / "foreign").write_bytes(b"kept")
    with Journal.open(out, {"other": 1}, resume=False) as journal:
        assert journal.records == []
    assert resumed(out, {"other": 1}) == []
    assert sorted(os.listdir(out / WORK)) == ["journal.jsonl", "lock"]
    assert sorted(os.listdir(out)) == [WORK, "foreign"]


def test_discard_leaves_an_output_without_journal(written: Path, out: Path) -> None:
    with Journal.open(out, PRINT, resume=True) as journal:
        (out / "model.safetensors").write_bytes(b"x")
        (out / WORK / "part-00001.safetensors").write_bytes(b"x")
        journal.discard()
    assert os.listdir(out) == ["model.safetensors"]
    assert resumed(out) == []  # and a new one can begin


def test_temporary_files_of_a_killed_run_are_swept(written: Path, out: Path) -> None:
    for place in (out, out / WORK):
        (place / ".tmp-half").write_bytes(b"half")
    resumed(out)
    assert sorted(os.listdir(out)) == [WORK]
    assert sorted(os.listdir(out / WORK)) == ["journal.jsonl", "lock"]


# ---- damage


def test_torn_tail_is_dropped_at_every_length_and_cut_off(written: Path, out: Path) -> None:
    whole = written.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for size in range(start, len(whole)):
        written.write_bytes(whole[:size])
        with Journal.open(out, PRINT, resume=True) as journal:
            assert journal.records == RECORDS[:2]
            assert written.read_bytes() == whole[:start]  # or the next line would be joined to the torn one
            journal.commit(RECORDS[2])
        assert written.read_bytes() == whole


@pytest.mark.parametrize("tail", [b"\0" * 4096, b'{"body"', b"\xff\xfe", b'{"body":{},"sha256":"'])
def test_garbage_tail_without_newline_is_dropped(tail: bytes, written: Path, out: Path) -> None:
    whole = written.read_bytes()
    written.write_bytes(whole + tail)
    assert resumed(out) == RECORDS
    assert written.read_bytes() == whole


def test_flipped_bit_in_any_byte_never_changes_a_record(written: Path, out: Path) -> None:
    whole = written.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        written.write_bytes(damaged)
        if position == len(whole) - 1:  # without its newline the last line is a torn one: done again, not trusted
            assert resumed(out) == RECORDS[:2]
            continue
        with pytest.raises(OutputError, match=r"journal\.jsonl: is damaged or not in order; start anew") as caught:
            resumed(out)
        assert str(caught.value).isprintable()


DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "two_lines_swapped": lambda lines: [lines[0], lines[2], lines[1], lines[3]],
    "first_unit_missing": lambda lines: [lines[0], *lines[2:]],
    "unit_twice": lambda lines: [*lines[:3], lines[2], lines[3]],
    "last_unit_twice": lambda lines: [*lines, lines[3]],
    "first_line_missing": lambda lines: lines[1:],
    "first_line_twice": lambda lines: [lines[0], *lines],
    "empty_line": lambda lines: [*lines[:2], b"\n", *lines[2:]],
    "carriage_returns": lambda lines: [line.replace(b"\n", b"\r\n") for line in lines],
    "respelled": lambda lines: [lines[0], lines[1].replace(b'"body":', b'"body": '), *lines[2:]],
    "line_of_another_form": lambda lines: [*lines, b'{"body":[],"sha256":""}\n'],
    "line_without_body": lambda lines: [*lines, b'{"sha256":""}\n'],
    "key_twice": lambda lines: [lines[0], lines[1].replace(b'{"body":', b'{"body":{},"body":'), *lines[2:]],
    "deep_json": lambda lines: [*lines, b"[" * 10**5 + b"\n"],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_journal_is_refused_and_left_alone(damage: str, written: Path, out: Path) -> None:
    data = b"".join(DAMAGE[damage](written.read_bytes().splitlines(keepends=True)))
    written.write_bytes(data)
    with pytest.raises(OutputError, match=r"journal\.jsonl: is damaged or not in order; start anew with --no-resume"):
        resumed(out)
    assert written.read_bytes() == data
    with Journal.open(out, PRINT, resume=False) as journal:
        assert journal.records == []


@pytest.mark.parametrize("data", [b"", b'{"body":{"fingerprint"'])
def test_journal_without_its_first_line_is_refused(data: bytes, written: Path, out: Path) -> None:
    written.write_bytes(data)
    with pytest.raises(OutputError, match="has lost its first line; start anew with --no-resume"):
        resumed(out)


def test_journal_from_the_future_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr("llmquant.checkpoint.journal.VERSION", 99)
        resumed(out)
    with pytest.raises(OutputError, match="was written by another version of llmquant"):
        resumed(out)


def test_journal_that_is_a_directory(written: Path, out: Path) -> None:
    written.unlink()
    written.mkdir()
    with pytest.raises(OutputError, match=r"journal\.jsonl: cannot be read: Is a directory"):
        resumed(out)


# ---- the fingerprint

CHANGES = {
    "recipe.bits was 4, is now 8": PRINT | {"recipe": {"bits": 8, "method": "rtn"}},
    "recipe.bits was 4, is now absent": PRINT | {"recipe": {"method": "gptq"}},
    "input.extra was absent, is now 1": PRINT | {"input": {"files": {"a": 1}, "extra": 1}},
    "input.files.a was 1, is now 2": PRINT | {"input": {"files": {"a": 2}}},
    'seed was 0, is now "0"': PRINT | {"seed": "0"},
    "seed was 0, is now false": PRINT | {"seed": False},
    "seed was 0, is now 0.0": PRINT | {"seed": 0.0},
    "seed was 0, is now [0]": PRINT | {"seed": [0]},
    'recipe was {"bits": 4, "method": "gptq"}, is now null': PRINT | {"recipe": None},
}


@pytest.mark.parametrize("words", CHANGES)
def test_other_fingerprint_is_refused_by_field(words: str, written: Path, out: Path) -> None:
    before = written.read_bytes()
    with pytest.raises(OutputError) as caught:
        resumed(out, CHANGES[words])
    assert str(caught.value) == f"{out}: {words}; run it as it was begun, or start anew with --no-resume"
    assert written.read_bytes() == before


def test_fingerprint_with_tuples_is_the_same_as_json(out: Path) -> None:
    resumed(out, {"layers": (1, 2)})
    assert resumed(out, {"layers": [1, 2]}) == []


# ---- commits that fail


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_record_with_nan_is_refused_and_not_written(bad: float, written: Path, out: Path) -> None:
    with Journal.open(out, PRINT, resume=True) as journal:
        with pytest.raises(NumericsError, match="a record holds a number that is not finite"):
            journal.commit({"loss": bad})
        journal.commit({"loss": 1.0})
    assert resumed(out) == [*RECORDS, {"loss": 1.0}]


FULL_DISK = """
import resource, sys
from pathlib import Path
from llmquant.checkpoint.journal import Journal
from llmquant.errors import OutputError
with Journal.open(Path(sys.argv[1]), {}, resume=True) as journal:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    journal.commit({"unit": 0})
    for text in ("x" * 2000, "y"):  # too much; then, after the failure, anything
        try:
            journal.commit({"unit": text})
        except OutputError as error:
            print(error)
"""


def test_full_disk_keeps_what_was_committed(out: Path, run_child: Any) -> None:
    child = run_child(FULL_DISK, out)
    first, second = child.stdout.splitlines()
    assert first.startswith(f"{out}/{WORK}/journal.jsonl: cannot write 2097 bytes: File too large; free space")
    assert second.endswith("is closed, perhaps after a failed write; run the same command again")
    assert (out / WORK / "journal.jsonl").stat().st_size == 1000  # torn
    assert resumed(out, {}) == [{"unit": 0}]


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(OutputError, match=r"out: cannot write: .*; "):
        Journal.open(tmp_path / "out", {}, resume=True)


# ---- the lock

HOLD = """
import sys, time
from pathlib import Path
from llmquant.checkpoint.journal import Journal
with Journal.open(Path(sys.argv[1]), {}, resume=True) as journal:
    print("locked", flush=True)
    time.sleep(60)
"""


def test_second_run_is_told_the_pid_and_a_dead_one_locks_nothing(out: Path) -> None:
    home = Path(llmquant.errors.__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, cwd=home) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"locked\n"
            before = (out / WORK / "lock").read_bytes()
            for resume in (True, False):
                with pytest.raises(OutputError, match=f"{out}: locked by pid {holder.pid}; wait for that run"):
                    Journal.open(out, {}, resume=resume)
            assert (out / WORK / "lock").read_bytes() == before == str(holder.pid).encode()
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    assert (out / WORK / "lock").read_bytes() == str(holder.pid).encode()  # left behind
    assert resumed(out, {}) == []


def test_lock_is_given_back_after_close_and_after_a_refusal(written: Path, out: Path) -> None:
    with pytest.raises(OutputError, match="seed was 0"):
        resumed(out, CHANGES["seed was 0, is now false"])
    with Journal.open(out, PRINT, resume=True), pytest.raises(OutputError, match=f"locked by pid {os.getpid()};"):
        resumed(out)
    assert resumed(out) == RECORDS


def test_commit_after_close_is_refused(written: Path, out: Path) -> None:
    journal = Journal.open(out, PRINT, resume=True)
    journal.close()
    with pytest.raises(OutputError, match="is closed"):
        journal.commit({})


# ---- a kill at every durable step of a whole run

KILLED = """
import itertools, os, signal, sys
from pathlib import Path
from llmquant.checkpoint import durable
from llmquant.checkpoint.journal import Journal
out, k, late = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "after"
count = itertools.count()
def deadly(real):
    def call(*args):
        mine = next(count) == k
        if mine and not late:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
for name in ("write_temp", "fsync", "replace", "append", "truncate", "remove", "make_directory"):
    setattr(durable, name, deadly(getattr(durable, name)))
with Journal.open(out, {"a": 1}, resume=True) as journal:
    for unit in range(len(journal.records), 3):
        journal.commit({"unit": unit})
        print(unit, flush=True)
    journal.discard()
    print("finished", count, flush=True)
"""


def test_kill_at_every_durable_step_loses_no_committed_unit(tmp_path: Path, run_child: Any) -> None:
    steps = int(run_child(KILLED, tmp_path / "whole", -1, "before").stdout.split("count(")[1].split(")")[0])
    assert steps > 20
    for k in range(steps):
        out = tmp_path / str(k)
        child = run_child(KILLED, out, k, "after" if k % 2 else "before")
        assert child.returncode == -signal.SIGKILL, child.stderr
        promised = [int(line) for line in child.stdout.split() if line.isdigit()]
        if (out / WORK).is_dir():
            units = [record["unit"] for record in resumed(out, {"a": 1})]
            assert units[: len(promised)] == promised
            assert len(units) <= len(promised) + 1
        else:
            assert promised in ([], [0, 1, 2])  # not begun, or done
        assert "finished" in run_child(KILLED, out, -1, "before").stdout
        assert os.listdir(out) == []


def test_lines_are_json_for_people_too(written: Path) -> None:
    head, *units = [json.loads(line)["body"] for line in written.read_text().splitlines()]
    assert head["fingerprint"] == PRINT
    assert units == RECORDS
