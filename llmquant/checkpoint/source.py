"""From what the user calls a model to a directory, and from names in it to files that may be opened.

An index or a config is text from a stranger: its file names could point at the user's keys, its keys could make a
loader fetch and run code. Both are settled here, before anything else is read.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from llmquant.checkpoint.shard import HEADER_LIMIT, opened, read_exact
from llmquant.errors import CheckpointError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
KERNEL_KEY = re.compile("(attn|experts)_implementation")  # a value "owner/name" there is code on the Hub
COMMIT = re.compile(r"[0-9a-f]{40}")
FETCHED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md"]
FLOATS = ("Infinity", "-Infinity", "NaN")
SKIPPED = ["*/*", "consolidated*"]  # folders (other runtimes' copies), Mistral's second copy of the weights


def locate(model: str | Path, revision: str | None, trust_remote_code: bool) -> tuple[Path, str | None]:
    """The directory of `model`, a path or a Hub name, and the commit when it came from the Hub."""
    if Path(model).is_dir():
        if revision is not None:
            raise CheckpointError(f"{model}: revision: is for names on the Hub, this is a directory; leave it out")
        return Path(model).resolve(), None
    name = str(model)
    if not HUB_NAME.fullmatch(name) or Path(model).exists():
        raise CheckpointError(f"{name}: is not a directory; give a model directory or a name on the Hub (owner/name)")
    if trust_remote_code and not COMMIT.fullmatch(revision or ""):
        raise CheckpointError(f"{name}: trust_remote_code: runs code of a moving branch; pin revision to a full commit")
    root = _download(name, revision, FETCHED + ["*.py"] * trust_remote_code).resolve()
    return root, root.name


def hub_origin(root: Path) -> dict[str, Any]:
    """`name` and `commit` of a directory in a Hub cache, CACHE/models--OWNER--NAME/snapshots/COMMIT; else nothing."""
    repo = root.parent.parent.name
    if root.parent.name != "snapshots" or not repo.startswith("models--") or not COMMIT.fullmatch(root.name):
        return {}
    return {"name": repo.removeprefix("models--").replace("--", "/", 1), "commit": root.name}


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=SKIPPED))
    except GatedRepoError as error:
        why = "the model is gated; accept its terms on its page and set HF_TOKEN"
        raise CheckpointError(f"{name}: {why}") from error
    except RepositoryNotFoundError as error:
        why = "neither a directory here nor a model the Hub shows us; check the name, or set HF_TOKEN if it is private"
        raise CheckpointError(f"{name}: {why}") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name}: has no revision {revision or 'main'!r} on the Hub; check it on the model's page"
        ) from error
    except Exception as error:  # the client passes on what its transports raise: httpx, xet, OSError, ValueError
        cause = str(error).split("\n")[0][:200]
        hint = "check the network and the name, or give a local directory"
        raise CheckpointError(
            f"{name}: cannot be fetched from the Hub ({type(error).__name__}: {cause}); {hint}"
        ) from error


def member(root: Path, name: str) -> Path:
    """The path of the file `name` in `root`; CheckpointError unless it is a plain name that stays inside.

    Inside means below `root` or, where `root` is a snapshot in a Hub cache, among the blobs that its links lead to.
    """
    path = root / name
    if not name.isprintable() or len(name) > 255 or not name.strip(". ") or set(name) & set("/\\:"):
        raise CheckpointError(f"{root}: {name[:80]!r} is not a plain file name; do not use this checkpoint")
    try:
        target = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; download the model again") from error
    if not any(target.is_relative_to(home) for home in _homes(root)):
        raise CheckpointError(f"{path}: is a link to {target}, outside the model; copy the file into the directory")
    if not target.is_file():
        raise CheckpointError(f"{path}: is not a regular file; a checkpoint holds plain files only")
    return path


def _homes(root: Path) -> list[Path]:
    """CACHE/models--x--y/snapshots/COMMIT links to CACHE/models--x--y/blobs, and that may link to CACHE/blobs."""
    repo = root.parent.parent
    if root.parent.name == "snapshots" and repo.name.startswith("models--"):
        return [root, repo / "blobs", repo.parent / "blobs"]
    return [root]


def read_small(path: Path) -> bytes:
    """A whole text file; CheckpointError above 64 MB."""
    with opened(path) as fd:
        size = os.fstat(fd).st_size
        if size > HEADER_LIMIT:
            raise CheckpointError(f"{path}: has {size} bytes, more than any such file needs; download it again")
        raw = bytearray(size)
        read_exact(fd, path, 0, memoryview(raw))
    return bytes(raw)


def check_config(path: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    """Refuse a config.json that would make transformers fetch or run code, or that names no model type."""
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path}: model_type: is missing; is this the directory of a transformers model?")
    for where, key, value in _walk(path, config):
        option = f"{path}: {where[:200]!r}"
        if key == "auto_map" and not trust_remote_code:
            raise CheckpointError(f"{option}: the model needs its own code; read it, then pass trust_remote_code")
        kernel = isinstance(value, str) and "/" in value and KERNEL_KEY.search(where)
        number = key == "__float__" and value in FLOATS  # as transformers writes what JSON has no word for
        if (key.startswith("__") and not number) or key.endswith("_internal") or key == "trust_remote_code" or kernel:
            raise CheckpointError(f"{option}: can make a loader run foreign code; remove the key")


def _walk(path: Path, config: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(dotted path, last key, value) of everything in nested JSON; list items have the path of their list."""
    pending: list[tuple[str, str, Any, int]] = [("", "", config, 0)]
    while pending:
        where, key, value, depth = pending.pop()
        yield where, key, value
        if depth > 32:
            raise CheckpointError(f"{path}: {where[:80]!r}: is nested too deep; download the file again")
        if isinstance(value, dict):
            pending += [(f"{where}.{inner}".strip("."), inner, item, depth + 1) for inner, item in value.items()]
        elif isinstance(value, list):
            pending += [(where, "", item, depth + 1) for item in value]
