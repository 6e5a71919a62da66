"""The text that is measured on: a file, or a data set of the Hub."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from llmquant.errors import RecipeError


@dataclass(frozen=True)
class Text:
    """What is read to the model, under the name that the protocol gives it."""

    name: str
    sha256: str  # of the file, or of the rows of a data set once joined
    content: str

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.sha256[:12]})"


def read_text(text_file: Path | None, dataset: str | None) -> Text:
    """Exactly one of the two sources."""
    if text_file is not None and dataset is None:
        return read_file(text_file)
    if dataset is not None and text_file is None:
        return read_dataset(dataset)
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
    return Text(path.name, sha256(data).hexdigest(), content)


def read_dataset(dataset: str) -> Text:
    """The `text` column of NAME[:CONFIG[:SPLIT]], rows joined by blank lines; the split is `test` if not named."""
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(f"--dataset {dataset}: needs the datasets package; pip install 'llmquant[hub]'") from error
    name, config, split, *rest = [*dataset.split(":"), "", ""]
    if not name or any(rest):
        raise RecipeError(f"--dataset {dataset}: is no data set name; write NAME[:CONFIG[:SPLIT]]")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "test")
    except Exception as error:  # datasets, its file systems and its HTTP client share no base class
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RecipeError(f"--dataset {dataset}: cannot be loaded ({cause}); check name and connection") from error
    if getattr(rows.features.get("text"), "dtype", None) not in ("string", "large_string"):
        raise RecipeError(f"--dataset {dataset}: has no column of strings named text; use --text-file")
    content = "\n\n".join(row or "" for row in rows["text"])
    return Text(f"{dataset}, rows joined by blank lines", sha256(content.encode()).hexdigest(), content)
