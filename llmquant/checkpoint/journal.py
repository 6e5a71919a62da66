"""Which units of work are durable, made from what, with which digests: all that a killed run needs to go on.

OUT/.llmquant/ exists exactly while OUT is unfinished, and holds what only that run needs. Its journal.jsonl has
one line per committed unit, after a first line with the fingerprint of everything the output depends on:

    {"body": {...}, "sha256": digest of the line before's digest and of this body}

The synced append of a line is the moment at which a unit counts as done. The digests form a chain, so a flipped
byte, a swapped, lost or foreign line is refused; only the torn tail of an append that never returned is dropped.
"""

import fcntl
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from llmquant.checkpoint import durable
from llmquant.checkpoint.strict_json import parse_object
from llmquant.errors import CheckpointError, NumericsError, OutputError

WORK = ".llmquant"
VERSION = 2  # of the journal's own form, and of its records'


class Journal:
    """An open journal; the lock on OUT is held until `close`, or until the process dies, however it dies."""

    records: list[dict[str, Any]]  # of the committed units, in order

    def __init__(self, out: Path, lock: int) -> None:
        self.records = []
        self._out = out
        self._path = out / WORK / "journal.jsonl"
        self._lock: int | None = lock
        self._digest = ""

    @classmethod
    def open(cls, out: Path, fingerprint: dict[str, Any], *, resume: bool) -> "Journal":
        """Lock `out` (created if missing), clear what a killed run left half written, and take up its journal.

        Without `resume`, or where there is no journal, a new one begins. OutputError if another run holds the lock,
        if the journal is damaged, or if `fingerprint` (JSON values) is not the one that the journal began with.
        """
        with durable.reported(out):
            durable.make_directory(out / WORK)
            journal = cls(out, _locked(out / WORK / "lock"))
        try:
            durable.sweep(out)
            durable.sweep(out / WORK)
            head = {"fingerprint": json.loads(_canonical(fingerprint)), "journal": VERSION}
            if resume and journal._path.exists():
                journal._load(head)
            else:
                journal._begin(head)
        except BaseException:
            journal.close()
            raise
        return journal

    def commit(self, record: dict[str, Any]) -> None:
        """Add a unit (JSON values). When this returns, the unit survives a power cut."""
        if self._lock is None:
            raise OutputError(f"{self._path}: is closed, perhaps after a failed write; run the same command again")
        try:
            line, digest = _line(self._digest, record)
        except ValueError as error:
            raise NumericsError(f"{self._path}: a record holds a number that is not finite: {error}") from error
        try:
            with durable.reported(self._path, len(line)):
                durable.append(self._path, line)
        except BaseException:
            self.close()  # the tail may be torn now; only `open` can cut it
            raise
        self._digest = digest
        self.records.append(json.loads(line)["body"])

    def discard(self) -> None:
        """The output is finished: remove OUT/.llmquant with all it holds. One rename decides; the rest is sweeping."""
        with durable.reported(self._out):
            durable.replace(self._out / WORK, durable.temp_of(self._out / WORK))
            durable.fsync(self._out)
        durable.sweep(self._out)
        self.close()

    def close(self) -> None:
        """Give the lock back; the journal stays for the next run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, head: dict[str, Any]) -> None:
        """Write the first line; then remove the parts of an earlier run, which no record speaks of any more."""
        line, self._digest = _line("", head)
        durable.write_file(self._path, [line], len(line))
        with durable.reported(self._path.parent):
            for entry in sorted(self._path.parent.iterdir()):
                if entry.name not in (self._path.name, "lock"):
                    durable.remove(entry)

    def _load(self, head: dict[str, Any]) -> None:
        """Check the chain from the first line on, cut off a torn tail, compare the fingerprint."""
        try:
            data = self._path.read_bytes()
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be read: {error.strerror}; choose another -o") from error
        whole = data.rfind(b"\n") + 1
        bodies = [self._checked(line) for line in data[:whole].splitlines(keepends=True)]
        if not bodies:
            raise OutputError(f"{self._path}: has lost its first line; start anew with --no-resume")
        found, *self.records = bodies
        if found.get("journal") != VERSION:
            raise OutputError(f"{self._path}: was written by another version of llmquant; use that, or --no-resume")
        if difference := _difference("", found.get("fingerprint"), head["fingerprint"]):
            raise OutputError(f"{self._out}: {difference}; run it as it was begun, or start anew with --no-resume")
        if whole < len(data):
            with durable.reported(self._path):
                durable.truncate(self._path, whole)

    def _checked(self, line: bytes) -> dict[str, Any]:
        """The body of a line that continues the chain byte for byte."""
        with suppress(CheckpointError):
            body = parse_object(line, self._path).get("body")
            if isinstance(body, dict):
                expected, digest = _line(self._digest, body)
                if line == expected:
                    self._digest = digest
                    return body
        raise OutputError(f"{self._path}: is damaged or not in order; start anew with --no-resume")


def _line(previous: str, body: dict[str, Any]) -> tuple[bytes, str]:
    """The line that holds `body` after the line with the digest `previous`, and its own digest."""
    digest = hashlib.sha256(f"{previous}\n{_canonical(body)}".encode()).hexdigest()
    return f"{_canonical({'body': body, 'sha256': digest})}\n".encode(), digest


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _locked(path: Path) -> int:
    """A descriptor that holds the lock. The kernel frees it when the process ends, so a stale file locks nothing."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            if not isinstance(error, BlockingIOError):
                raise
            out = path.parent.parent
            raise OutputError(f"{out}: locked by pid {holder}; wait for that run, or choose another -o") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), path.stat()):  # else a run that finished took the file away meanwhile
                os.ftruncate(fd, 0)
                os.pwrite(fd, str(os.getpid()).encode(), 0)
                return fd
        os.close(fd)


def _difference(where: str, was: Any, now: Any) -> str | None:
    """The first field, in sorted order, in which two JSON values differ, with both values."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            inner = f"{where}.{key}" if where else key
            if found := _difference(inner, was.get(key, _ABSENT), now.get(key, _ABSENT)):
                return found
        return None
    return None if repr(was) == repr(now) else f"{where} was {_shown(was)}, is now {_shown(now)}"


_ABSENT = object()


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)[:80]
