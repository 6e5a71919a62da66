"""Where calibration text comes from: the built-in prompts, a file, or a data set of the Hub.

Every source ends as a list of `Document`s in the order of the source; nothing is tokenized here.
One line of a JSONL file, and one row of a data set, is a JSON object with one of

    input_ids   token ids, used as they are (with `attention_mask`: ids whose mask is 0 are dropped)
    messages    a conversation, [{"role": ..., "content": ...}, ...]
    text        a plain passage

(the first that is there, in this order) and optionally `src`, the name under which its tokens are counted.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from llmquant.errors import CalibrationError

MAX_DOCUMENT_BYTES = 100_000_000  # a longer line or text file is a mistake (or a memory bomb), not a document
HUB_ROWS = 4096  # read from a data set when no limit is given: most are too long to read to the end


class Message(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """One piece of calibration text: exactly one of `input_ids`, `messages` and `text` is set."""

    source: str  # the name its tokens are counted under
    where: str  # for error messages: "calib.jsonl: line 7"
    input_ids: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    text: str | None = None


def load_documents(source: str, *, limit: int | None = None) -> list[Document]:
    """The documents of `builtin`, `FILE.jsonl`, `FILE.txt` or `hf:NAME[:CONFIG][:SPLIT]`, at most `limit` of them.

    The built-in categories are interleaved, so that the first documents are a fair mix. A text file is one document:
    its paragraphs belong together, and `batches.build` cuts it into sequences. A data set is streamed; its split is
    `train` unless named (`hf:NAME::SPLIT` for the default configuration), its length 4096 rows unless limited.

    Raises CalibrationError, naming the file and the line, for everything that is not such a source.
    """
    if source == "builtin":
        documents: Iterable[Document] = _builtin()
    elif source.startswith("hf:"):
        documents = _data_set(source, HUB_ROWS if limit is None else limit)
    elif source.endswith(".jsonl"):
        documents = _jsonl(Path(source))
    elif source.endswith(".txt"):
        documents = [_text_file(Path(source))]
    else:
        raise CalibrationError(
            f"calibration: {source!r} is no source; use builtin, self, FILE.jsonl, FILE.txt or hf:NAME[:CONFIG][:SPLIT]"
        )
    found = list(islice(documents, limit))
    if not found:
        raise CalibrationError(f"{source}: holds no documents; give at least one line of text, messages or input_ids")
    return found


def _builtin() -> list[Document]:
    """The prompts written for this project, one from each category in turn."""
    prompts = resources.files("llmquant.calibration") / "prompts"
    names = sorted(entry.name for entry in prompts.iterdir() if entry.name.endswith(".jsonl"))
    categories = []
    for name in names:
        with resources.as_file(prompts / name) as path:
            categories.append(list(_jsonl(path, source=path.stem)))
    return [document for turn in zip_longest(*categories) for document in turn if document is not None]


def _jsonl(path: Path, source: str | None = None) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{where}: is not UTF-8 at byte {error.start}; re-encode the file") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise CalibrationError(f"{where}: is not JSON ({error}); each line must be one JSON object") from error
        yield _document(row, source or path.name, where)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, none of them ever larger in memory than the limit."""
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_DOCUMENT_BYTES + 1):
                number += 1
                if len(line) > MAX_DOCUMENT_BYTES:
                    raise CalibrationError(
                        f"{path}: line {number}: is longer than {MAX_DOCUMENT_BYTES // 10**6} MB; split it"
                    )
                yield line
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _text_file(path: Path) -> Document:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise CalibrationError(f"{path}: is larger than {MAX_DOCUMENT_BYTES // 10**6} MB; a part of it is enough")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CalibrationError(f"{path}: line {line}: is not UTF-8; re-encode the file") from error
    if not text.strip():
        raise CalibrationError(f"{path}: is empty; give it some text")
    return Document(source=path.name, where=str(path), text=text)


def _data_set(source: str, rows: int) -> Iterator[Document]:
    """Stream the first rows of a Hub data set (or of a local directory of data files) through `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(f"{source}: needs the datasets package; pip install 'llmquant[hub]'") from error
    name, config, split, *rest = [*source.removeprefix("hf:").split(":"), "", ""]
    if not name or any(rest):
        raise CalibrationError(f"{source}: is no data set name; write hf:NAME[:CONFIG][:SPLIT]")
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(islice(stream, rows), start=1):
            yield _document(row, f"hf:{name}", f"{source}: row {number}")
    except CalibrationError:
        raise
    except Exception as error:  # datasets, its file systems and its HTTP client share no base class
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CalibrationError(f"{source}: cannot be loaded ({cause}); check the name and the connection") from error


def _document(row: Any, source: str, where: str) -> Document:
    """A JSON object as a document, its fields checked."""
    if not isinstance(row, dict):
        raise CalibrationError(
            f"{where}: is not a JSON object; each line must be one, with text, messages or input_ids"
        )
    source = row.get("src", source)
    if not isinstance(source, str):
        raise CalibrationError(f"{where}: src is not a string; name the source of the line or leave src out")
    if row.get("input_ids") is not None:
        return Document(source, where, input_ids=_token_ids(row["input_ids"], row.get("attention_mask"), where))
    if row.get("messages") is not None:
        return Document(source, where, messages=_messages(row["messages"], where))
    if isinstance(row.get("text"), str):
        return Document(source, where, text=row["text"])
    found = ", ".join(map(str, list(row)[:8])) or "nothing"
    raise CalibrationError(f"{where}: has no text, messages or input_ids (found: {found}); rename the field")


def _token_ids(ids: Any, mask: Any, where: str) -> tuple[int, ...]:
    # type() rather than isinstance: True and False are ints to Python, but not token ids
    if not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids):
        raise CalibrationError(f"{where}: input_ids is not a list of whole numbers >= 0; write token ids")
    if mask is None:
        return tuple(ids)
    if not isinstance(mask, list) or len(mask) != len(ids) or any(m not in (0, 1) for m in mask):
        raise CalibrationError(f"{where}: attention_mask is not a 0 or 1 for each of the {len(ids)} input_ids; fix it")
    return tuple(i for i, m in zip(ids, mask, strict=True) if m)


def _messages(messages: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise CalibrationError(f"{where}: messages is not a list with at least one message; fix it")
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
            raise CalibrationError(
                f'{where}: a message is not {{"role": "...", "content": "..."}}; only text can be used'
            )
    return tuple(Message(message["role"], message["content"]) for message in messages)
