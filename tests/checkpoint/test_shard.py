"""The shard parser accepts what the format allows and nothing else, and says what is wrong with the rest."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from llmquant.checkpoint.shard import DTYPES, opened, read_exact, read_header, read_pieces, read_tensor
from llmquant.errors import CheckpointError

Build = Callable[[Any, bytes], bytes]


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read_all(path: Path) -> dict[str, torch.Tensor]:
    with opened(path) as fd:
        return {name: read_tensor(fd, path, info) for name, info in read_header(path).items()}


def test_reads_every_dtype_as_safetensors_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch.manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, (3, 5), dtype=torch.uint8).to(dtype)
        for name, dtype in DTYPES.items()
    }  # fmt: skip
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "odd": torch.arange(7, dtype=torch.int8)}
    save_file(tensors, path, metadata={"format": "pt", "by": "test"})
    ours = read_all(path)
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        assert ours[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8)), name


def test_a_tensor_read_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    tensor = read_all(path)["w"]
    path.write_bytes(b"\0" * path.stat().st_size)
    assert tensor.sum() == 1000


GOOD = {"w": entry()}
BROKEN: dict[str, tuple[Any, bytes, str]] = {
    "data_one_byte_short": (GOOD, b"1234567", "was cut short"),
    "data_one_byte_over": (GOOD, b"123456789", "has trailing bytes"),
    "tensors_overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "b: overlaps the tensor before it"),
    "tensors_share_bytes": ({"a": entry(), "b": entry()}, bytes(8), "b: overlaps the tensor before it"),
    "gap_between_tensors": ({"a": entry(), "b": entry(offsets=[9, 17])}, bytes(17), "b: leaves a gap"),
    "gap_at_the_start": ({"a": entry(offsets=[1, 9])}, bytes(9), "a: leaves a gap"),
    "range_runs_backwards": ({"w": entry(offsets=[8, 0])}, bytes(8), "w: has data_offsets that are no byte range"),
    "range_is_negative": ({"w": entry(offsets=[-8, 0])}, bytes(8), "no byte range"),
    "range_has_three_ends": ({"w": entry(offsets=[0, 4, 8])}, bytes(8), "no byte range"),
    "range_of_texts": ({"w": entry(offsets=["0", "8"])}, bytes(8), "no byte range"),
    "range_beyond_64_bits": ({"w": entry(offsets=[0, 2**64])}, bytes(8), "no byte range"),
    "shape_overflows": ({"w": entry(shape=[2**32, 2**32], offsets=[0, 0])}, b"", "a shape that no tensor can have"),
    "shape_overflows_beside_zero": ({"w": entry(shape=[0, 2**62], offsets=[0, 0])}, b"", "a shape that no tensor"),
    "shape_is_negative": ({"w": entry(shape=[-2])}, bytes(8), "a shape that no tensor can have"),
    "shape_is_boolean": ({"w": entry(shape=[True, 2])}, bytes(8), "a shape that no tensor can have"),
    "shape_is_fractional": ({"w": entry(shape=[2.0])}, bytes(8), "a shape that no tensor can have"),
    "shape_is_a_number": ({"w": entry(shape=2)}, bytes(8), "a shape that no tensor can have"),
    "shape_of_a_million": ({"w": entry(shape=[1] * 10**6)}, bytes(8), "a shape that no tensor can have"),
    "dtype_too_wide": ({"w": entry(dtype="F64")}, bytes(8), r"w: needs 16 bytes for F64 \[2\]"),
    "dtype_unknown": ({"w": entry(dtype="F4")}, bytes(8), "w: has the dtype 'F4', which is not supported"),
    "dtype_is_a_list": ({"w": entry(dtype=["F32"])}, bytes(8), "which is not supported"),
    "key_missing": ({"w": {"dtype": "F32", "shape": [2]}}, bytes(8), "not described by exactly dtype, shape"),
    "key_unknown": ({"w": entry() | {"more": 1}}, bytes(8), "not described by exactly dtype, shape"),
    "tensor_is_a_list": ({"w": [1]}, bytes(8), "not described by exactly dtype, shape"),
    "metadata_is_a_list": ({"__metadata__": [], "w": entry()}, bytes(8), "__metadata__ that is not a map of texts"),
    "metadata_holds_a_number": ({"__metadata__": {"a": 1}, "w": entry()}, bytes(8), "not a map of texts"),
    "name_with_newline": ({"w\nerror: all is well": entry()}, bytes(8), "no printable text"),
    "name_with_half_a_surrogate": (b'{"\\ud800": {}}', b"", "no printable text"),
    "name_without_end": ({"w" * 10**6: entry()}, bytes(8), "at most 512 characters"),
    "header_is_a_list": (b"[]", b"", "header that is not a JSON object"),
    "header_is_a_text": (b'"{}"', b"", "header that is not a JSON object"),
    "header_is_cut": (json.dumps(GOOD).encode()[:-3], bytes(8), "not valid JSON"),
    "header_with_bom": (b"\xef\xbb\xbf{}", b"", "not a JSON object"),
    "header_not_utf8": (b'{"\xff": {}}', b"", "not valid JSON"),
    "header_with_duplicate_tensor": (b'{"w": {}, "w": {}}', b"", "the key 'w' occurs twice"),
    "header_with_duplicate_key": (b'{"w": {"dtype": "F32", "dtype": "I8"}}', b"", "the key 'dtype' occurs twice"),
    "header_with_nan": (b'{"w": NaN}', b"", "the number NaN is not finite"),
    "header_with_1e999": (b'{"w": 1e999}', b"", "the number 1e999 is not finite"),
    "header_with_endless_integer": (b'{"w": ' + b"9" * 10**6 + b"}", b"", "not valid JSON"),
    "header_nested_deep": (b'{"w": ' + b"[" * 10**6, b"", "nested too deep"),
    "header_nested_deep_in_objects": (b'{"w":' * 10**5, b"", "nested too deep"),
}


@pytest.mark.parametrize("attack", BROKEN)
def test_broken_header_is_refused(attack: str, tmp_path: Path, shard_bytes: Build) -> None:
    header, data, words = BROKEN[attack]
    path = tmp_path / "w.safetensors"
    path.write_bytes(shard_bytes(header, data))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()  # one line
    assert len(message) < 600


IMPOSTORS = {
    "lfs_pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "run `git lfs pull`"),
    "html_page": (b"<!DOCTYPE html><html><body>Log in</body></html>", "is an HTML page, not the weights"),
    "html_page_without_doctype": (b"<html lang=en>", "is an HTML page, not the weights"),
    "torch_archive": (b"PK\x03\x04" + bytes(100), "is a PyTorch or zip archive"),
    "pickle": (b"\x80\x02}q\x00." + bytes(20), "is a Python pickle, which is never opened"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(20), "is a GGUF file"),
    "empty": (b"", "is empty, as an interrupted download"),
    "five_bytes": (b"\x08\0\0\0\0", "has only 5 bytes"),
    "length_2_to_40": (struct.pack("<Q", 2**40) + b"{}", "claims a header of 1099511627776 bytes"),
    "length_2_to_64": (b"\xff" * 8 + b"{}", "claims a header of 18446744073709551615 bytes"),
    "length_past_the_end": (struct.pack("<Q", 100) + b"{}", "has only 10, so it was cut short"),
    "length_zero": (struct.pack("<Q", 0), "not a JSON object"),
}


@pytest.mark.parametrize("impostor", IMPOSTORS)
def test_what_is_no_shard_is_called_by_its_name(impostor: str, tmp_path: Path) -> None:
    data, words = IMPOSTORS[impostor]
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "; " in str(caught.value)  # and what to do


def test_every_cut_of_a_good_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    data = path.read_bytes()
    read_header(path)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_header(path)


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "missing"])
def test_only_regular_files_are_opened_and_none_hangs(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    words = "cannot be read: No such file" if kind == "missing" else "is not a regular file"
    with pytest.raises(CheckpointError, match=words):
        read_header(path)


def test_file_that_shrinks_under_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    info = read_header(path)["w"]
    with opened(path) as fd:
        os.truncate(path, info.end - 1)
        with pytest.raises(CheckpointError, match=f"ends at byte {info.end - 1}"):
            read_tensor(fd, path, info)
        with pytest.raises(CheckpointError, match="shorter than when opened"):
            list(read_pieces(fd, path, info.start, info.end))


def test_read_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)  # reading a directory is the plainest EISDIR
    try:
        with pytest.raises(CheckpointError, match=f"{tmp_path}: cannot be read: Is a directory"):
            read_exact(fd, tmp_path, 0, memoryview(bytearray(8)))
    finally:
        os.close(fd)


BOUNDED = """
import resource, sys
from pathlib import Path
from llmquant.checkpoint.shard import read_header
from llmquant.errors import CheckpointError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(len(read_header(Path(sys.argv[1]))))
except CheckpointError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(("count", "words"), [(100_000, "100000"), (900_000, "more than 250000 tensors")])
def test_bloated_header_takes_bounded_memory(
    count: int, words: str, tmp_path: Path, shard_bytes: Build, run_child: Any
) -> None:
    path = tmp_path / "w.safetensors"
    rows = (f'"t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(count))
    path.write_bytes(shard_bytes(("{" + ",".join(rows) + "}").encode(), bytes(count)))
    told, megabytes = run_child(BOUNDED, path).stdout.splitlines()
    assert words in told
    assert float(megabytes) < 300


def check_sound(path: Path) -> None:
    """What we accept lies inside the file, and the safetensors library accepts it too."""
    try:
        infos = read_header(path)
    except CheckpointError:
        return
    assert all(0 < info.start <= info.end <= path.stat().st_size for info in infos.values())
    with safe_open(path, framework="pt") as theirs:
        assert set(theirs.keys()) == set(infos)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(list(DTYPES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "", 7]),
        "shape": st.lists(st.integers(-1, 4) | st.just(2**63), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | json_values, max_size=4)
fuzz = settings(deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])  # ms for one input


@settings(fuzz, max_examples=700)
@given(header=headers, size=st.integers(0, 60))
def test_fuzz_of_headers(header: dict[str, Any], size: int, tmp_path: Path, shard_bytes: Build) -> None:
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(shard_bytes(header, bytes(size)))
    check_sound(path)


@settings(fuzz, max_examples=1300)
@given(edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4), cut=st.integers(0, 40))
def test_fuzz_of_bytes(edits: list[tuple[int, int]], cut: int, tmp_path: Path, shard_bytes: Build) -> None:
    header = {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("BF16", [2, 3], [8, 20])}
    data = bytearray(shard_bytes(header, bytes(20)))
    for position, value in edits:
        data[position % len(data)] = value
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(data[: len(data) - cut] if cut > 20 else data)
    check_sound(path)
