"""A checkpoint opens only if names, index, shards and config agree; after that, a file that changes is noticed."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquant.checkpoint.reader import Checkpoint
from llmquant.checkpoint.writer import write_shard
from llmquant.errors import CheckpointError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"

Edit = Callable[[Path], object]


def edit_index(change: Callable[[dict[str, str]], object]) -> Edit:
    def edit(root: Path) -> None:
        index = json.loads((root / INDEX).read_text())
        change(index["weight_map"])
        (root / INDEX).write_text(json.dumps(index))

    return edit


def edit_shard(file: str, change: Callable[[dict[str, Tensor]], object]) -> Edit:
    def edit(root: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(root / file).items()}
        change(tensors)
        save_file(tensors, root / file)

    return edit


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_what_safetensors_wrote(layout: str, tensors: dict[str, Tensor], request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(layout)
    checkpoint = Checkpoint.open(root)
    assert checkpoint.tensors.keys() == tensors.keys() == checkpoint.file_of.keys()
    assert checkpoint.files == ((FIRST, SECOND) if layout == "sharded" else ("model.safetensors",))
    assert checkpoint.config["hidden_size"] == 8
    assert checkpoint.commit is None
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
        streamed = b"".join(checkpoint.lazy(name).read())
        assert streamed == bytes(tensor.flatten().view(torch.uint8).numpy().data)


def test_lazy_tensors_go_into_a_shard_of_ours(sharded: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    write_shard(tmp_path / "copy", {name: checkpoint.lazy(name) for name in checkpoint.tensors})
    for name, tensor in load_file(tmp_path / "copy").items():
        assert torch.equal(tensor, tensors[name])


def test_quantized_checkpoint_opens_too(single: Path) -> None:
    (single / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    assert Checkpoint.open(str(single)).config["quantization_config"] == {"quant_method": "gptq"}


# What is done to a good model in two shards, and words of the message that must come.
BROKEN: dict[str, tuple[Edit, str]] = {
    "shard_missing": (lambda root: (root / SECOND).unlink(), f"{SECOND}: No such file"),
    "shard_empty": (lambda root: (root / SECOND).write_bytes(b""), f"{SECOND}: is empty"),
    "shard_is_lfs_pointer": (
        lambda root: (root / FIRST).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        f"{FIRST}: is a git-LFS pointer",
    ),
    "shard_cut": (lambda root: os.truncate(root / SECOND, 300), f"{SECOND}: was cut short"),
    "shard_unlisted": (
        lambda root: save_file({"x": torch.ones(1)}, root / "model-00003-of-00003.safetensors"),
        f"model-00003-of-00003.safetensors: is not in {INDEX}",
    ),
    "single_file_beside_the_index": (
        lambda root: save_file({"x": torch.ones(1)}, root / "model.safetensors"),
        f"model.safetensors: is not in {INDEX}",
    ),
    "tensor_not_in_the_index": (edit_index(lambda m: m.pop(NORM)), f"{SECOND}: {NORM}: is not in {INDEX}"),
    "tensor_not_in_its_shard": (
        edit_index(lambda m: m.update(ghost=FIRST)),
        f"{FIRST}: ghost: is missing, though {INDEX} lists it",
    ),
    "tensor_in_the_other_shard": (
        edit_index(lambda m: m.update({EMBED: SECOND})),
        f"{FIRST}: {EMBED}: is in {SECOND} according to {INDEX}",
    ),
    "tensor_in_two_shards": (
        edit_shard(SECOND, lambda t: t.update({EMBED: torch.ones(1)})),
        f"{SECOND}: {EMBED}: is also in {FIRST}",
    ),
    "tensor_lost_from_its_shard": (edit_shard(SECOND, lambda t: t.pop(NORM)), f"{SECOND}: {NORM}: is missing"),
    "index_is_empty": (lambda root: (root / INDEX).write_bytes(b""), f"{INDEX}: not valid JSON"),
    "index_maps_nothing": (edit_index(lambda m: m.clear()), f"{INDEX}: weight_map: is missing or empty"),
    "index_without_map": (lambda root: (root / INDEX).write_text("{}"), "weight_map: is missing or empty"),
    "index_map_is_a_list": (lambda root: (root / INDEX).write_text('{"weight_map": []}'), "is missing or empty"),
    "index_is_a_list": (lambda root: (root / INDEX).write_text("[]"), f"{INDEX}: holds a JSON list, not an object"),
    "index_with_duplicate_tensor": (
        lambda root: (root / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        "the key 'a' occurs twice",
    ),
    "index_maps_to_a_number": (edit_index(lambda m: m.update(a=7)), "a: is in '7', not a .safetensors file"),
    "index_names_a_pickle": (edit_index(lambda m: m.update(a="x.bin")), "a: is in 'x.bin', not a .safetensors"),
    "index_with_newline_in_a_name": (edit_index(lambda m: m.update({"a\nb": FIRST})), "is no tensor name"),
    "index_is_huge": (lambda root: os.truncate(root / INDEX, 2**36), f"{INDEX}: has 68719476736 bytes, more than"),
    "weights_as_pickle_only": (
        lambda root: [(root / n).unlink() for n in (FIRST, SECOND, INDEX)] + [(root / "pytorch_model.bin").touch()],
        "no safetensors weights, and pytorch_model.bin is in a format that is not read; convert the model first",
    ),
    "weights_as_gguf_only": (
        lambda root: [(root / n).unlink() for n in (FIRST, SECOND, INDEX)] + [(root / "m.gguf").touch()],
        "no safetensors weights, and m.gguf is in a format that is not read",
    ),
    "weights_missing": (
        lambda root: [(root / name).unlink() for name in (FIRST, SECOND, INDEX)],
        f"has neither model.safetensors nor {INDEX}",
    ),
    "shards_without_index": (lambda root: (root / INDEX).unlink(), f"has neither model.safetensors nor {INDEX}"),
    "config_missing": (lambda root: (root / "config.json").unlink(), "has no config.json"),
    "config_empty": (lambda root: (root / "config.json").write_bytes(b""), "config.json: not valid JSON"),
    "config_is_html": (lambda root: (root / "config.json").write_text("<html>"), "config.json: not valid JSON"),
    "config_not_utf8": (lambda root: (root / "config.json").write_bytes(b'{"a":"\xff"}'), "not valid JSON"),
    "config_is_a_fifo": (
        lambda root: [(root / "config.json").unlink(), os.mkfifo(root / "config.json")],
        "config.json: is not a regular file",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_checkpoint_is_refused(fault: str, sharded: Path) -> None:
    edit, words = BROKEN[fault]
    Checkpoint.open(sharded)
    edit(sharded)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(sharded)
    message = str(caught.value)
    assert words in message
    assert message.startswith(str(sharded))
    assert message.isprintable()
    assert len(message) < 600


def test_model_without_tensors_is_refused(single: Path) -> None:
    save_file({}, single / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        Checkpoint.open(single)


def test_unknown_tensor_is_refused(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model: ghost: there is no such tensor"):
        Checkpoint.open(single).read("ghost")
    with pytest.raises(CheckpointError, match=r"model: ghost: there is no such tensor"):
        Checkpoint.open(single).lazy("ghost")


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def swap(path: Path) -> None:
    (path.parent / "new").write_bytes(path.read_bytes())
    os.replace(path.parent / "new", path)


@pytest.mark.parametrize("change", [grow, shrink, rewrite, touch, swap])
def test_shard_that_changes_after_open_is_not_read(change: Edit, sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    os.utime(sharded / SECOND, ns=(0, 10**18))
    checkpoint = Checkpoint.open(sharded)
    change(sharded / SECOND)
    assert checkpoint.read(EMBED) is not None  # the other shard is as it was
    for attempt in (checkpoint.read, lambda name: list(checkpoint.lazy(name).read())):
        with pytest.raises(CheckpointError, match=f"{SECOND}: changed since it was opened; put the original back"):
            attempt(NORM)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        checkpoint.fingerprint()


def test_shard_that_vanishes_after_open(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    (sharded / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"{SECOND}: cannot be read: No such file"):
        checkpoint.read(NORM)


def test_shard_that_changes_while_it_streams(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    stream = iter(checkpoint.lazy(EMBED).read())
    next(stream)
    touch(single / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        list(stream)


def test_side_files_are_what_belongs_beside_the_weights(single: Path) -> None:
    kept = [
        "LICENSE", "NOTICE.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json", "merges.txt",
        "preprocessor_config.json", "special_tokens_map.json", "spiece.model", "tokenizer.json",
        "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    left = [
        "README.md",
        "quantize_config.json",
        "modeling_x.py",
        "tokenizer.bin",
        "model.gguf",
        "tokenizer.safetensors",
    ]
    for name in kept + left:
        (single / name).write_text("{}")
    (single / "tokenizer_files").mkdir()
    assert Checkpoint.open(single).side_files() == kept
    assert Checkpoint.open(single, trust_remote_code=True).side_files() == kept  # no auto_map: its code is not needed
    (single / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "modeling_x.X"}}')
    with_code = Checkpoint.open(single, trust_remote_code=True)
    assert with_code.side_files() == sorted([*kept, "modeling_x.py"])


def test_fingerprint_is_json_and_says_what_it_saw(sharded: Path) -> None:
    found = Checkpoint.open(sharded).fingerprint()
    assert json.loads(json.dumps(found)) == found
    assert found["config"] == hashlib.sha256((sharded / "config.json").read_bytes()).hexdigest()
    assert found["side"] == {"tokenizer.json": hashlib.sha256(b"{}").hexdigest()}
    status = (sharded / FIRST).stat()
    raw = (sharded / FIRST).read_bytes()
    header = hashlib.sha256(raw[: 8 + int.from_bytes(raw[:8], "little")]).hexdigest()
    assert found["files"][FIRST] == {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "header": header}
    assert Checkpoint.open(sharded).fingerprint() == found


CHANGES: dict[str, Edit] = {
    "config": lambda root: (root / "config.json").write_text('{"model_type": "llama"}'),
    "side": lambda root: (root / "tokenizer.json").write_text("{} "),
    "files": lambda root: rewrite(root / FIRST),
}


@pytest.mark.parametrize("field", CHANGES)
def test_fingerprint_moves_with_the_input(field: str, sharded: Path) -> None:
    before: dict[str, Any] = Checkpoint.open(sharded).fingerprint()
    CHANGES[field](sharded)
    after = Checkpoint.open(sharded).fingerprint()
    assert [key for key in before if before[key] != after[key]] == [field]
