"""What the writer writes is safetensors to the safetensors library, the same bytes every time, and finite."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llmquant.checkpoint.shard import DTYPES, PIECE, Lazy, read_header
from llmquant.checkpoint.writer import copy_file, write_json, write_shard
from llmquant.errors import CheckpointError, NumericsError, OutputError


def packed() -> dict[str, torch.Tensor]:
    """Tensors as a packed layer has them: odd sizes, narrow before wide."""
    torch.manual_seed(0)
    return {
        "zeros": torch.randint(0, 255, (3, 5), dtype=torch.uint8),
        "scales": torch.rand(3, 1).bfloat16(),
        "codes": torch.randint(-(2**31), 2**31 - 1, (3, 4), dtype=torch.int32),
        "shape": torch.tensor([3, 32]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.0),
        "strided": torch.randn(6, 4).t()[::2],
    }


def test_safetensors_reads_it_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = write_shard(path, packed())
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    theirs = load_file(path)
    assert theirs.keys() == packed().keys()
    for name, tensor in packed().items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor), name
    for backend in ("pread", "mmap"):
        with safe_open(path, framework="pt", backend=backend) as file:
            assert file.metadata() == {"format": "pt"}
            assert torch.equal(file.get_tensor("scales"), packed()["scales"])


def test_every_dtype_goes_through_safetensors(tmp_path: Path) -> None:
    values = {name: torch.tensor([0, 1, 1, 0, 1], dtype=torch.uint8).to(dtype) for name, dtype in DTYPES.items()}
    write_shard(tmp_path / "a.safetensors", values)
    theirs = load_file(tmp_path / "a.safetensors")
    for name, tensor in values.items():
        assert theirs[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", packed())
    infos = read_header(tmp_path / "a.safetensors")
    assert {name: info.start % info.dtype.itemsize for name, info in infos.items()} == dict.fromkeys(packed(), 0)
    widths = [info.dtype.itemsize for info in infos.values()]
    assert widths == sorted(widths, reverse=True)
    assert [name for name in infos if infos[name].dtype.itemsize == 4] == ["codes", "empty", "scalar", "strided"]


def test_bytes_are_written_down_here(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_shard(path, {"w": torch.tensor([1.0, -2.0])})
    header = b'{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * (-len(header) % 8)
    expected = len(header).to_bytes(8, "little") + header + bytes.fromhex("0000803f000000c0")
    assert path.read_bytes() == expected


def test_lazy_and_loaded_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensor = torch.randn(PIECE // 4 + 1000)  # one piece and a bit

    def pieces() -> Iterator[bytearray]:
        raw = bytes(tensor.view(torch.uint8).numpy().data)
        for start in range(0, len(raw), PIECE):
            yield bytearray(raw[start : start + PIECE])

    lazy = Lazy(tensor.dtype, tuple(tensor.shape), pieces)
    digests = {write_shard(tmp_path / "a", {"w": tensor}), write_shard(tmp_path / "b", {"w": lazy})}
    assert len(digests) == 1
    assert torch.equal(load_file(tmp_path / "b")["w"], tensor)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_not_finite_stops_with_name_and_index(bad: float, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    tensor = torch.ones(3, 5)
    tensor[2, 1] = bad
    with pytest.raises(NumericsError, match=rf"{path}: layer.weight: element \[2, 1\] is {bad}; check this tensor"):
        write_shard(path, {"fine": torch.ones(2), "layer.weight": tensor.to(dtype)})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert path.read_bytes() == b"old"


def test_not_finite_in_a_later_piece_of_a_stream(tmp_path: Path) -> None:
    tensor = torch.ones(PIECE // 2 + 4, 2, dtype=torch.float16)
    tensor[-1, 1] = float("nan")
    with pytest.raises(NumericsError, match=rf"w: element \[{len(tensor) - 1}, 1\] is nan"):
        write_shard(tmp_path / "a", {"w": tensor})


@pytest.mark.parametrize("given", [8, 24])
def test_stream_of_the_wrong_length_is_no_file(given: int, tmp_path: Path) -> None:
    lazy = Lazy(torch.float32, (4,), lambda: [bytearray(given)])
    with pytest.raises(OutputError, match=f"w: its source gave {given} bytes of 16"):
        write_shard(tmp_path / "a", {"w": lazy})
    assert os.listdir(tmp_path) == []


def test_dtype_without_a_name_in_the_format(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"w: safetensors cannot hold torch.complex128; convert it"):
        write_shard(tmp_path / "a", {"w": torch.ones(2, dtype=torch.complex128)})


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from llmquant.checkpoint.writer import write_shard
from llmquant.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_shard(Path(sys.argv[1]), {"w": torch.ones(50_000)})
except OutputError as error:
    print(error)
"""


def test_full_disk_keeps_the_old_shard(tmp_path: Path, run_child: Any) -> None:
    path = tmp_path / "model-00001.safetensors"
    write_shard(path, {"w": torch.zeros(3)})
    child = run_child(FULL_DISK, path)
    assert child.stdout.startswith(f"{path}: cannot write 200104 bytes: File too large; free space"), child
    assert load_file(path)["w"].tolist() == [0, 0, 0]
    assert os.listdir(tmp_path) == [path.name]


def test_json_is_sorted_and_ends_in_a_newline(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    digest = write_json(path, {"b": [1, 2.5], "a": "é\ud800"})
    assert path.read_bytes().startswith(b'{\n  "a": "')
    assert path.read_bytes().endswith(b"]\n}\n")
    assert json.loads(path.read_bytes()) == {"a": "é\ud800", "b": [1, 2.5]}
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_copy_is_byte_for_byte(tmp_path: Path) -> None:
    data = os.urandom(PIECE + 17)
    (tmp_path / "a").write_bytes(data)
    assert copy_file(tmp_path / "a", tmp_path / "b") == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "b").read_bytes() == data


def test_copy_of_nothing_blames_the_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}/a: cannot be read: No such file"):
        copy_file(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == []
