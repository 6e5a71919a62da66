"""Is a finished directory whole, finite, and as its recipe promised?

Loaders accept a checkpoint with a missing scale or a flipped bit without a word, so the producer has to
prove completeness. Run before a run calls itself done, and as `llmquant verify DIR`.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from llmquant.assign import assign
from llmquant.checkpoint.journal import WORK
from llmquant.checkpoint.parts import file_sha256
from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import LlmquantError, VerifyError
from llmquant.formats import FORMATS, for_config
from llmquant.manifest import LOG, MANIFEST, RECIPE, conversion_of, is_sealed, read_manifest
from llmquant.model.layout import Layout, derive_layout
from llmquant.model.names import Names, tied_names
from llmquant.model.shell import check_finite, empty_model, read_config
from llmquant.recipe import Recipe
from llmquant.scheme import Scheme


def verify_checkpoint(directory: str | Path) -> int:
    """Check a finished directory. Returns the number of files whose digests hold.

    Raises:
        VerifyError: names the first problem and counts the rest.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise VerifyError(f"{directory}: is not a directory; give the output directory of `llmquant quantize`")
    if (directory / WORK).is_dir():
        raise VerifyError(f"{directory}: holds an unfinished run; give the same quantize command again to finish it")
    if problems := problems_of(directory):
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise VerifyError(f"{directory}: {problems[0]}{more}; quantize again or fetch the directory again")
    return len(read_manifest(directory)) + 2  # the manifest itself and the sealed log


def problems_of(directory: Path) -> list[str]:
    """All that is wrong with a directory, one sentence each."""
    try:
        if problems := list(_digest_problems(directory)):
            return problems
        converted = conversion_of(directory)
        checked = converted is None or converted["to"] in FORMATS  # of other products the digests are all there is
        return list(_content_problems(Checkpoint.open(directory), promised=converted is None)) if checked else []
    except LlmquantError as error:
        return [str(error)]


def _digest_problems(directory: Path) -> Iterator[str]:
    digests = read_manifest(directory)
    for name, digest in digests.items():
        if not (directory / name).is_file():
            yield f"{name} is missing"
        elif file_sha256(directory / name) != digest:
            yield f"{name} is not the file that was written: its sha256 differs"
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in digests:
            yield f"{path.name} is not listed in {MANIFEST}"
    log = directory / LOG
    if not log.is_file() or not is_sealed(log.read_bytes()):
        yield f"{LOG} is missing or not as it was written"
    elif conversion_of(directory) is None:
        for name in {"config.json", RECIPE} - set(digests):
            yield f"{name} is not listed in {MANIFEST}"


def _content_problems(source: Checkpoint, *, promised: bool) -> Iterator[str]:
    """Tensors against the model and, where there is one, the recipe; every number finite."""
    config = read_config(source)
    layout = derive_layout(config, trust_remote_code=source.trust_remote_code)
    block = source.config["quantization_config"]
    schemes = for_config(block).read_config(block, list(layout.shapes))
    if promised:
        yield from _broken_promises(schemes, Recipe.from_yaml(source.root / RECIPE), layout)
    yield from _tensor_problems(source, schemes, layout.shapes)


def _broken_promises(schemes: dict[str, Scheme], recipe: Recipe, layout: Layout) -> Iterator[str]:
    promised = {
        linear.name: linear.scheme
        for layer in layout.layers
        for group in layer.groups
        for linear in assign(group, recipe, layout)
        if linear.scheme
    }
    if schemes != promised:
        name = next(name for name in {**schemes, **promised} if schemes.get(name) != promised.get(name))
        yield f"config.json: {name} is {schemes.get(name)}, but the recipe promises {promised.get(name)}"


def _tensor_problems(
    source: Checkpoint, schemes: dict[str, Scheme], shapes: dict[str, tuple[int, int]]
) -> Iterator[str]:
    expected = expected_tensors(source, schemes, shapes)
    for name, (dtype, shape) in expected.items():
        info = source.tensors.get(name)
        if info is None:
            yield f"tensor {name} is missing"
        elif info.shape != shape or (dtype is not None and info.dtype != dtype):
            yield f"tensor {name} is {info.dtype} {info.shape}, expected {dtype or ''} {shape}"
    for name, file in source.file_of.items():
        tensor = source.read(name)
        check_finite(tensor, f"{file}: {name}")
        if name.endswith((".weight_scale", ".scales")) and not bool(tensor.all()):
            yield f"{file}: {name} holds a scale of zero"


def expected_tensors(
    source: Checkpoint, schemes: dict[str, Scheme], shapes: dict[str, tuple[int, int]]
) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Every tensor that the model needs, packed where a scheme says so. The dtype is None where any float will do."""
    pack = for_config(source.config["quantization_config"]).specs
    model = empty_model(read_config(source), trust_remote_code=source.trust_remote_code)
    tied, names = tied_names(model), Names(model, source)
    expected: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        linear = name.removesuffix(".weight")
        if name in tied:
            continue
        specs = {name: (torch.float32, tuple(tensor.shape))}
        if linear in schemes:
            specs = pack(linear, *shapes[linear], schemes[linear], torch.float32)
        for needed, (dtype, shape) in specs.items():
            kind = None if dtype.is_floating_point else dtype
            *firsts, last = names.parts(needed) or (needed,)
            for part in firsts:  # each has the rows that it has, and the last what is left of them
                rows = next(iter(source.tensors[part].shape), 0)
                expected[part] = kind, (rows, *shape[1:])
                shape = (shape[0] - rows, *shape[1:])
            expected[last] = kind, shape
    return expected
