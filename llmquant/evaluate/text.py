"""The text that is measured on: a file, or a data set of the Hub."""

from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from llmquant.errors import RecipeError


@dataclass(frozen=True)
class Text:
    """What is read to the model, under the name that the protocol gives it."""

    name: str
    sha256: str  # of the file, or of the rows of a data set once joined
    documents: tuple[str, ...]  # one for a file; the rows of a data set
    joined: str = ""  # what stands between two of them

    @property
    def content(self) -> str:
        return self.joined.join(self.documents)

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.sha256[:12]})"


@dataclass(frozen=True)
class Dataset:
    """Where a data set is, and how its rows make a text."""

    path: str
    config: str | None = None
    split: str = "test"
    column: str = "text"
    joined: str = "\n\n"
    rows: int | None = None  # the first so many
    options: dict[str, Any] = field(default_factory=dict)  # of datasets.load_dataset


# As the GPTQ paper's code reads them. Of C4 it takes the first shard of the validation part, and 1100 documents of it.
NAMED = {
    "wikitext2": Dataset("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": Dataset(
        "allenai/c4",
        split="validation",
        joined=" ",
        rows=1100,
        options={"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
    ),
    "ptb": Dataset(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        column="sentence",
        joined=" ",
        options={"revision": "refs/convert/parquet"},  # the Hub's own conversion: its loading script is not run
    ),
}
BETWEEN = {"\n\n": "blank lines", " ": "spaces"}


class Source(NamedTuple):
    """Where to read from: exactly one of the two."""

    text_file: Path | None = None
    dataset: str | None = None

    def read(self) -> Text:
        """Raises RecipeError unless exactly one is given and can be read."""
        if self.text_file is not None and self.dataset is None:
            return read_file(self.text_file)
        if self.dataset is not None and self.text_file is None:
            return read_dataset(self.dataset)
        raise RecipeError("--text-file, --dataset: give one of the two to measure on")


def read_file(path: Path) -> Text:
    """A UTF-8 file; line ends of any kind are read as newlines, since models know few of the others."""
    try:
        data = path.read_bytes()
        content = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise RecipeError(f"--text-file {path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"--text-file {path}: byte {error.start} is not UTF-8; convert the file") from error
    return Text(path.name, sha256(data).hexdigest(), (content,))


def read_dataset(name: str) -> Text:
    """One of NAMED, or the `text` column of PATH[:CONFIG[:SPLIT]] with its rows joined by blank lines."""
    return read_rows(name, NAMED.get(name) or _parse(name))


def _parse(name: str) -> Dataset:
    path, config, split, *rest = [*name.split(":"), "", ""]
    if not path or any(rest):
        raise RecipeError(f"--dataset {name}: is no data set name; write {', '.join(NAMED)} or PATH[:CONFIG[:SPLIT]]")
    return Dataset(path, config or None, split or "test")


def read_rows(name: str, wanted: Dataset) -> Text:
    """The text of a data set.

    Raises:
        RecipeError: it cannot be loaded, or does not have the column.
    """
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(f"--dataset {name}: needs the datasets package; pip install 'llmquant[hub]'") from error
    try:
        rows = datasets.load_dataset(wanted.path, wanted.config, split=wanted.split, **wanted.options)
    except Exception as error:  # datasets, its file systems and its HTTP client share no base class
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RecipeError(f"--dataset {name}: cannot be loaded ({cause}); check name and connection") from error
    if getattr(rows.features.get(wanted.column), "dtype", None) not in ("string", "large_string"):
        raise RecipeError(f"--dataset {name}: has no column of strings named {wanted.column}; use --text-file")
    documents = tuple(row or "" for row in rows[: wanted.rows][wanted.column])
    digest = sha256(wanted.joined.join(documents).encode()).hexdigest()
    return Text(f"{name}, rows joined by {BETWEEN[wanted.joined]}", digest, documents, wanted.joined)
