"""At any instant a name holds the whole old content or the whole new one, and an error leaves nothing behind."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmquant.checkpoint import durable
from llmquant.errors import CheckpointError, OutputError

PRIMITIVES = ("write_temp", "fsync", "replace", "append", "truncate", "remove", "make_directory")


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The primitives as they are called, outermost and inner; each still does its work."""
    calls: list[str] = []

    def traced(name: str) -> Callable[..., Any]:
        real = getattr(durable, name)

        def call(*args: Any) -> Any:
            target = getattr(args[-1], "name", None) if name != "truncate" else args[0].name
            calls.append(f"{name} {Path(str(target)).name}")
            return real(*args)

        return call

    for name in PRIMITIVES:
        monkeypatch.setattr(durable, name, traced(name))
    return calls


def test_file_is_synced_before_its_name_and_the_name_after(tmp_path: Path, trace: list[str]) -> None:
    digest = durable.write_file(tmp_path / "a", [b"one", bytearray(b"two"), memoryview(b"three")])
    assert (tmp_path / "a").read_bytes() == b"onetwothree"
    assert digest == hashlib.sha256(b"onetwothree").hexdigest()
    assert trace == ["write_temp a", "fsync .tmp-a", "replace a", f"fsync {tmp_path.name}"]
    assert os.listdir(tmp_path) == ["a"]


def test_append_syncs_the_bytes_and_once_the_name(tmp_path: Path, trace: list[str]) -> None:
    path = tmp_path / "log"
    durable.append(path, b"one\n")
    durable.append(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
    assert [call for call in trace if call.startswith("fsync")] == ["fsync log", f"fsync {tmp_path.name}", "fsync log"]


def test_truncate_and_remove_are_synced(tmp_path: Path, trace: list[str]) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntw")
    durable.truncate(path, 4)
    assert path.read_bytes() == b"one\n"
    durable.remove(path)
    durable.remove(path)  # again, as a resumed run does
    assert not path.exists()
    assert trace == ["truncate log", "fsync log", *["remove log", f"fsync {tmp_path.name}"] * 2]


def test_make_directory_syncs_every_new_name(tmp_path: Path, trace: list[str]) -> None:
    durable.make_directory(tmp_path / "a" / "b")
    durable.make_directory(tmp_path / "a" / "b")
    assert [call for call in trace if call.startswith("fsync")] == [f"fsync {tmp_path.name}", "fsync a"]


@pytest.mark.parametrize("error", [CheckpointError("source"), KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_error_midway_keeps_the_old_file_and_leaves_no_temp(error: BaseException, tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"new"
        raise error

    (tmp_path / "a").write_bytes(b"old")
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        durable.write_file(tmp_path / "a", chunks())
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_missing_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=f"{tmp_path}/no/a: cannot write 3 bytes: No such file or directory; "):
        durable.write_file(tmp_path / "no" / "a", [b"abc"], 3)


def test_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "no").write_bytes(b"")
    with pytest.raises(OutputError, match="Not a directory; choose an output directory that you can write to"):
        durable.write_file(tmp_path / "no" / "a", [b"abc"])


READ_ONLY = """
import os, sys
from pathlib import Path
from llmquant.checkpoint import durable
from llmquant.errors import OutputError
if os.geteuid() == 0:  # root may write anywhere
    os.setuid(65534)
try:
    durable.write_file(Path(sys.argv[1]), [b"abc"])
except OutputError as error:
    print(error)
"""


def test_read_only_directory_is_one_line(tmp_path: Path, run_child: Any) -> None:
    tmp_path.chmod(0o555)
    child = run_child(READ_ONLY, tmp_path / "a")
    tmp_path.chmod(0o755)
    words = "cannot write: Permission denied; choose an output directory that you can write to"
    assert child.stdout == f"{tmp_path / 'a'}: {words}\n", child.stderr
    assert os.listdir(tmp_path) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
from llmquant.checkpoint import durable
from llmquant.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    durable.write_file(Path(sys.argv[1]), [bytes(60_000)] * 2, 120_000)
except OutputError as error:
    print(error)
"""


def test_full_disk_names_path_and_bytes_and_keeps_the_old_file(tmp_path: Path, run_child: Any) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    child = run_child(FULL_DISK, path)
    assert child.stdout.startswith(f"{path}: cannot write 120000 bytes: File too large; free space, then run"), child
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
from llmquant.checkpoint import durable
path, k, late = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "after"
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
for name in ("write_temp", "fsync", "replace"):
    setattr(durable, name, deadly(getattr(durable, name)))
durable.write_file(path, [b"new"] * 1000)
print("finished")
"""


def test_kill_at_every_step_leaves_the_old_or_the_new_file(tmp_path: Path, run_child: Any) -> None:
    old, new = b"old" * 1000, b"new" * 1000
    outcomes = {}
    for k in range(4):
        for when in ("before", "after"):
            (tmp_path / "a").write_bytes(old)
            child = run_child(KILLED, tmp_path / "a", k, when)
            assert child.returncode == -9, child.stderr
            outcomes[k, when] = (tmp_path / "a").read_bytes()
            durable.sweep(tmp_path)
            assert os.listdir(tmp_path) == ["a"]
    assert [outcome == new for outcome in outcomes.values()] == [False] * 5 + [True] * 3
    assert [outcome == old for outcome in outcomes.values()] == [True] * 5 + [False] * 3
    assert run_child(KILLED, tmp_path / "a", 4, "before").stdout == "finished\n"  # there is no fifth step


def test_sweep_takes_temporary_names_only(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"kept")
    here = tmp_path / "out"
    (here / ".tmp-.llmquant").mkdir(parents=True)
    (here / ".tmp-.llmquant" / "journal.jsonl").write_bytes(b"x")
    (here / ".tmp-model.safetensors").write_bytes(b"half")
    (here / ".tmp-link").symlink_to(outside)
    (here / "model.safetensors").write_bytes(b"whole")
    durable.sweep(here)
    durable.sweep(tmp_path / "missing")
    assert os.listdir(here) == ["model.safetensors"]
    assert outside.read_bytes() == b"kept"
