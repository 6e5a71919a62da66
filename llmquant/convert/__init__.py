"""`llmquant convert`: a quantized checkpoint in another form, with the same integers, or a reason why not.

Nothing is rounded a second time. Tensors are converted one by one as they are written, so that memory does not grow
with the model; a run that was stopped goes on with the file that it was at.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from llmquant.checkpoint import durable
from llmquant.checkpoint.journal import Journal
from llmquant.checkpoint.parts import file_sha256
from llmquant.convert import packed
from llmquant.convert.product import Product
from llmquant.convert.source import Source
from llmquant.errors import OutputError, RecipeError, VerifyError
from llmquant.finish import already_finished, check_output, clear, digest_of
from llmquant.formats import FORMATS
from llmquant.manifest import LOG, MANIFEST, RECIPE, manifest_bytes, sealed
from llmquant.model.experts import has_experts
from llmquant.verify import problems_of
from llmquant.version import __version__

# What is no layout of checkpoints that we read back -> the module that makes it, whose packages are optional.
EXPORTS = {
    "gguf": "llmquant.convert.gguf",
    "onnx": "llmquant.convert.onnx",
    "modelopt": "llmquant.convert.modelopt",
}
EXPERTS = ("compressed-tensors", "gguf")  # what is written of mixtures of experts: elsewhere they would be lost


@dataclass(frozen=True)
class Conversion:
    """What was made: layouts, files, linears, and what clients will not read of it."""

    out: str
    source: str
    to: str
    linears: int
    files: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": self.out, "from": self.source, "to": self.to, "linears": self.linears,
            "files": list(self.files), "notes": list(self.notes), "verified": True,
        }  # fmt: skip


def convert(directory: str | Path, out: str | Path, to: str, *, overwrite: bool = False) -> Conversion:
    """Write the quantized checkpoint `directory` in the layout `to` into the directory `out`, and verify it.

    Raises:
        RecipeError: `to` cannot hold these integers; nothing is written.
        CheckpointError: `directory` is not quantized, or damaged.
        NumericsError: a scale is not exact in the dtype that `to` stores it in.
        OutputError: `out` cannot be used.
    """
    out = Path(out)
    source = Source.open(directory)
    check_output(out, source.checkpoint.root)
    product = _product(source, to)
    files = product.files
    fingerprint = {"convert": to, "input": source.checkpoint.fingerprint(), "llmquant": __version__}
    origin = source.layout.NAME if source.schemes else "original"
    made = Conversion(str(out), origin, to, len(source.schemes), tuple(files), product.notes)
    if already_finished(out, fingerprint, overwrite=overwrite):
        return made
    with Journal.open(out, fingerprint, resume=True) as journal:
        if not journal.records:
            clear(out)
        digests = {record["file"]: record["sha256"] for record in journal.records}
        for name, digest in digests.items():
            if not (out / name).is_file() or file_sha256(out / name) != digest:
                raise OutputError(f"{out / name}: is not what this run wrote; remove {out} and convert again")
        for name, write in files.items():
            if name not in digests:
                digests[name] = write(out / name)
                journal.commit({"file": name, "sha256": digests[name]})
        _seal(out, source, made, digests, digest_of(fingerprint))
        journal.discard()
    return made


def _seal(out: Path, source: Source, made: Conversion, digests: dict[str, str], fingerprint: str) -> None:
    """Log and manifest; VerifyError if the directory is not what it should be, and its last file is gone then."""
    recipe = source.checkpoint.root / RECIPE
    origin = {"from": made.source, "to": made.to, "recipe": recipe.read_text("utf-8") if recipe.is_file() else None}
    head = {"converted": origin, "fingerprint": fingerprint, "notes": list(made.notes)}
    durable.write_file(out / LOG, [sealed([head])])
    durable.write_file(out / MANIFEST, [manifest_bytes(digests)])
    if problems := problems_of(out):
        with durable.reported(out):
            durable.remove(out / made.files[-1])
        raise VerifyError(f"{out}: {problems[0]}; {len(problems)} problems in all, remove it and convert again")


def _product(source: Source, to: str) -> Product:
    """What `to` stands for; RecipeError if a package for it is not installed, or experts would not be found there."""
    if has_experts(source.model) and to not in EXPERTS:
        raise RecipeError(f"--to {to}: is not written for mixtures of experts; {', '.join(EXPERTS)} is")
    if to in FORMATS:
        return packed.product(source, to)
    try:
        maker = import_module(EXPORTS[to])
    except ImportError as error:
        raise RecipeError(f"--to {to}: needs the package {error.name}; pip install 'llmquant[{to}]'") from error
    made: Product = maker.product(source)
    return made
