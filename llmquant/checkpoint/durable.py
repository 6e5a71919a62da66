"""Every durable change to the disk goes through the small functions at the top of this file.

A file is written beside its name, synced, renamed into place, and the directory is synced: at any instant, a power
cut included, a name holds the whole old content or the whole new one. Fault tests wrap the primitives by name to
kill the process at the k-th of them, so they are looked up at call time (`durable.replace(...)`) everywhere.

The primitives raise OSError; `reported` turns it into the one-line OutputError.
"""

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from llmquant.errors import OutputError

TEMP = ".tmp-"


def write_temp(path: Path) -> BinaryIO:
    """A fresh, unbuffered file beside `path`, named `.tmp-<name>`."""
    return open(temp_of(path), "wb", buffering=0)


def fsync(target: BinaryIO | Path) -> None:
    """Make the bytes of an open file, or the names in a directory, survive a power cut."""
    if not isinstance(target, Path):
        return os.fsync(target.fileno())
    fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace(source: Path, target: Path) -> None:
    """Rename `source` over `target` in one step (durable once their directory is synced)."""
    os.replace(source, target)


def append(path: Path, data: bytes) -> None:
    """Add `data` to the end of `path` (created if missing) and sync; a crash inside leaves a prefix of `data`."""
    created = not path.exists()
    with open(path, "ab", buffering=0) as file:
        _write_all(file, data)
        fsync(file)
    if created:
        fsync(path.parent)


def truncate(path: Path, size: int) -> None:
    """Cut `path` down to its first `size` bytes and sync."""
    with open(path, "r+b", buffering=0) as file:
        file.truncate(size)
        fsync(file)


def remove(path: Path) -> None:
    """Unlink `path`, if it is there, and sync its directory."""
    path.unlink(missing_ok=True)
    fsync(path.parent)


def make_directory(path: Path) -> None:
    """Create `path` and the parents it lacks, and sync every name created; nothing if it is there."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    fsync(path.parent)


def temp_of(path: Path) -> Path:
    """Where `path` is written before it takes its name."""
    return path.with_name(TEMP + path.name)


def write_file(path: Path, chunks: Iterable[bytes | bytearray | memoryview], nbytes: int | None = None) -> str:
    """Write `chunks` to `path` atomically; returns the sha256 in hex.

    `nbytes` is the total, for the message when the disk is full. OutputError on any failure of the disk; after an
    error of any kind, from `chunks` too, the old content of `path` stands and no temporary file is left.
    """
    digest = hashlib.sha256()
    try:
        with reported(path, nbytes):
            with write_temp(path) as file:
                for chunk in chunks:
                    digest.update(chunk)
                    _write_all(file, chunk)
                fsync(file)
            replace(temp_of(path), path)
            fsync(path.parent)
    except BaseException:
        with suppress(OSError):
            temp_of(path).unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def sweep(directory: Path) -> None:
    """Remove what a killed run left in `directory` under a temporary name; nothing if it does not exist."""
    with reported(directory):
        for entry in sorted(directory.glob(TEMP + "*")):
            if entry.is_dir() and not entry.is_symlink():
                for inner in sorted(entry.iterdir()):
                    remove(inner)
                entry.rmdir()
            else:
                remove(entry)


@contextmanager
def reported(path: Path, nbytes: int | None = None) -> Iterator[None]:
    """Turn an OSError inside the block into an OutputError: path, bytes needed, cause, what to do."""
    try:
        yield
    except OSError as error:
        amount = "" if nbytes is None else f" {nbytes} bytes"
        raise OutputError(f"{path}: cannot write{amount}: {error.strerror or error}; {_remedy(error.errno)}") from error


def _remedy(code: int | None) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space, then run the same command again: finished layers are kept"
    if code in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
        return "choose an output directory that you can write to"
    return "check the disk, then run the same command again: finished layers are kept"


def _write_all(file: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data).cast("B")
    while view:  # an unbuffered write may take only a part, above 2 GB always
        view = view[file.write(view) :]
