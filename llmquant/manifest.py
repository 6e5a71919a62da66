"""What a finished directory says about itself: digests of its files, its recipe, and a sealed log of the run.

The manifest has the form of `sha256sum`, so that `sha256sum -c SHA256SUMS` checks a directory without
llmquant. The log holds times, which differ from run to run; so it is not in the manifest (equal runs have
equal manifests) but ends in a line with its own digest.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from llmquant.errors import VerifyError

MANIFEST = "SHA256SUMS"
RECIPE = "llmquant_recipe.yaml"
LOG = "llmquant_log.jsonl"
REPORT = "report.html"  # made of the others; not in the manifest, since it shows times
ATTEMPTS = "llmquant_attempts.json"  # of a search; only there if one was made
MIXTURE = ".llmquant/mixture.json"  # of a run that is not finished: what its target was settled to

_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\x00-\x1f]+)\n")


def manifest_bytes(digests: dict[str, str]) -> bytes:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()


def read_manifest(directory: Path) -> dict[str, str]:
    """File name -> sha256.

    Raises:
        VerifyError: there is no manifest, or a line of it is not `sha256  name`.
    """
    path = directory / MANIFEST
    try:
        lines = path.read_bytes().decode("utf-8").splitlines(keepends=True)
    except OSError as error:
        raise VerifyError(
            f"{path}: cannot be read ({error.strerror}); llmquant did not finish this directory"
        ) from error
    except UnicodeDecodeError as error:
        raise VerifyError(f"{path}: is damaged: not UTF-8 at byte {error.start}") from error
    digests = {}
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in ("..", ".") or match[2] in digests:
            raise VerifyError(f"{path}: is damaged: line {number} is not `sha256  file`")
        digests[match[2]] = match[1]
    return digests


def sealed(records: list[dict[str, Any]]) -> bytes:
    """JSON lines, the last of which is the digest of all before it."""
    body = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records).encode()
    return body + json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n"


def is_sealed(data: bytes) -> bool:
    body, newline, _ = data.removesuffix(b"\n").rpartition(b"\n")
    body += newline
    return data == body + json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n"


def conversion_of(directory: Path) -> dict[str, Any] | None:
    """What the log says of a directory that `convert` made: `from`, `to` and more; None for one of `quantize`."""
    head = json.loads((directory / LOG).read_bytes().partition(b"\n")[0])
    return head.get("converted") if isinstance(head, dict) else None
