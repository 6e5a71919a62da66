"""The interface of the CUDA library refuses what its kernels cannot do, by a code that has words."""

import ctypes

import pytest
import torch
from emulated_cuda import (
    BOXES,
    CLUSTER,
    DEQUANTIZE,
    GEMM,
    GEMV,
    PAIRS,
    SPLIT,
    WGMMA,
    Emulator,
    Linear,
    Packed,
    Weight,
    random_weight,
)

from llmquant.scheme import Scheme

SIZE, GROUP, KIND, ALIGNMENT, PATH, ROOM, OLD = range(-1, -8, -1)


@pytest.fixture(scope="module")
def packed(emulator: Emulator) -> Packed:
    return emulator.pack(random_weight(Scheme(4, 64), 64, 128), Scheme(4, 64), torch.float16)


def linear(packed: Packed, **changes: int) -> Linear:
    """A task that is right but for its workspace, and then changed."""
    weight = Weight(*(getattr(packed.task, name) for name, _ in Weight._fields_))
    for name in list(changes):
        if name in dict(Weight._fields_):
            setattr(weight, name, changes.pop(name))
    return Linear(weight, **{"x": 16, "y": 16, "tokens": 3, "x_stride": 128, "kind": 1, **changes})


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"rows": 0}, SIZE),
        ({"columns": -1}, SIZE),
        ({"rows": 2**40}, SIZE),
        ({"tokens": 0}, SIZE),
        ({"x_stride": 120}, SIZE),
        ({"group": 48}, GROUP),
        ({"group": 16}, GROUP),
        ({"scale_kind": 2}, KIND),
        ({"scale_kind": 0}, KIND),
        ({"kind": 2}, KIND),
        ({"bias": 16, "bias_kind": 3}, KIND),
        ({"x": 8}, ALIGNMENT),
        ({"y": 2}, ALIGNMENT),
        ({"codes": 4}, ALIGNMENT),
        ({"x_stride": 132}, ALIGNMENT),
        ({"path": 9}, PATH),
        ({"path": GEMV, "tokens": 9}, PATH),
        ({"path": CLUSTER, "tokens": 9}, PATH),
        ({"path": PAIRS, "tokens": 64}, PATH),
        ({"path": BOXES, "tokens": 64}, PATH),
        ({"path": GEMM, "tokens": 2**28, "rows": 2**28}, SIZE),
    ],
    ids=str,
)
def test_tasks_are_refused(emulator: Emulator, packed: Packed, changes: dict[str, int], code: int) -> None:
    emulator.emulate()
    task = linear(packed, **changes)
    assert emulator.call("path", ctypes.byref(task)) == code
    assert emulator.call("linear", ctypes.byref(task), None) == code
    assert emulator.functions.llmquant_cuda_message(ctypes.c_int64(code)) != b"an unknown error"


def test_the_workspace_has_to_be_there(emulator: Emulator, packed: Packed) -> None:
    emulator.emulate()
    task = linear(packed)
    assert emulator.call("linear", ctypes.byref(task), None) == ROOM
    task.partials_bytes, task.tickets_count = emulator.sizes("workspace", task, 2)
    task.tickets_count -= 1
    assert emulator.call("linear", ctypes.byref(task), None) == ROOM


def test_slabs_are_inside_of_the_weight(emulator: Emulator, packed: Packed) -> None:
    def refused(first: int, count: int, kind: int = 1, out: int = 16) -> int:
        numbers = map(ctypes.c_int64, (first, count, kind))
        return emulator.call("dequantize", ctypes.byref(packed.task), *numbers, ctypes.c_void_p(out), None)

    assert refused(0, 65) == refused(64, 1) == refused(1, 1) == refused(-64, 64) == refused(0, 0) == SIZE
    assert refused(0, 64, kind=3) == KIND
    assert refused(0, 64, out=8) == ALIGNMENT


@pytest.mark.parametrize(
    ("capability", "paths"),
    [
        (100, {1: GEMV, 8: GEMV, 9: GEMM, 512: GEMM, 513: DEQUANTIZE}),
        (90, {1: GEMV, 8: GEMV, 9: WGMMA, 512: WGMMA, 513: PAIRS, 2**20: PAIRS}),
        (89, {8: GEMV, 9: GEMM, 256: GEMM, 257: DEQUANTIZE}),
        (80, {8: GEMV, 9: GEMM, 256: GEMM, 257: DEQUANTIZE}),
        (75, {1: OLD}),
    ],
)
def test_paths_by_tokens(emulator: Emulator, packed: Packed, capability: int, paths: dict[int, int]) -> None:
    emulator.emulate(capability=capability)
    found = {tokens: emulator.call("path", ctypes.byref(linear(packed, tokens=tokens))) for tokens in paths}
    assert found == paths


@pytest.mark.parametrize(
    ("rows", "columns", "paths"),
    [
        (28672, 8192, {1: GEMV, 16: SPLIT, 64: WGMMA, 256: PAIRS}),
        (8192, 8192, {1: CLUSTER, 16: WGMMA, 64: WGMMA, 256: SPLIT, 512: WGMMA, 1024: PAIRS}),
        (14336, 4096, {1: CLUSTER, 16: SPLIT, 64: SPLIT, 256: WGMMA, 512: PAIRS}),
        (4096, 14336, {1: GEMV, 16: WGMMA, 64: WGMMA, 512: SPLIT, 1024: WGMMA, 4096: PAIRS}),
        (4096, 4096, {1: CLUSTER, 16: SPLIT, 64: SPLIT}),
        (128256, 4096, {1: GEMV, 16: WGMMA, 64: WGMMA, 128: PAIRS}),
    ],
)
def test_paths_by_shape(emulator: Emulator, packed: Packed, rows: int, columns: int, paths: dict[int, int]) -> None:
    """Of 132 multiprocessors, as on an H100, but in seven GPCs of 18 and one of 6: its own are not known to be that."""
    emulator.emulate(132, gpc=18)
    sizes = {"rows": rows, "columns": columns, "x_stride": columns}
    found = {k: emulator.call("path", ctypes.byref(linear(packed, tokens=k, **sizes))) for k in paths}
    assert found == paths


def test_clusters_all_find_room(emulator: Emulator, packed: Packed) -> None:
    """64 of two blocks do where GPCs are of 18 multiprocessors, and not of 17, of which one is left over."""
    task = linear(packed, rows=8192, columns=8192, x_stride=8192, tokens=256)
    for gpc, path in {18: SPLIT, 17: WGMMA}.items():
        emulator.emulate(132, gpc=gpc)
        assert emulator.call("path", ctypes.byref(task)) == path


def test_what_cannot_be_counted_is_dequantized(emulator: Emulator, packed: Packed) -> None:
    emulator.emulate()
    task = linear(packed, tokens=2**28, rows=2**20)
    assert emulator.call("path", ctypes.byref(task)) == DEQUANTIZE


def test_clusters_are_of_newer_devices(emulator: Emulator, packed: Packed) -> None:
    for capability, expected in {80: PATH, 89: PATH, 90: CLUSTER, 120: CLUSTER}.items():
        emulator.emulate(capability=capability)
        assert emulator.call("path", ctypes.byref(linear(packed, tokens=2, path=CLUSTER))) == expected


@pytest.mark.parametrize(("path", "tokens"), [(CLUSTER, 2), (SPLIT, 2), (SPLIT, 200)])
def test_what_adds_up_in_clusters_needs_no_workspace(
    emulator: Emulator, packed: Packed, path: int, tokens: int
) -> None:
    emulator.emulate()
    assert emulator.sizes("workspace", linear(packed, tokens=tokens, path=path), 2) == [0, 0]


def test_wgmma_is_for_its_devices(emulator: Emulator, packed: Packed) -> None:
    for path in (WGMMA, PAIRS, BOXES, SPLIT):
        for capability, expected in {80: PATH, 90: path, 100: PATH}.items():
            emulator.emulate(capability=capability)
            assert emulator.call("path", ctypes.byref(linear(packed, tokens=80, path=path))) == expected


def test_pairs_have_the_workspace_of_two(emulator: Emulator, packed: Packed) -> None:
    emulator.emulate(processors=7)
    paths = WGMMA, PAIRS, BOXES
    single, double, boxed = (emulator.sizes("workspace", linear(packed, tokens=200, path=path), 2) for path in paths)
    assert boxed == double
    assert double[0] % 2 == double[1] % 2 == 0
    assert double[1] >= single[1] > 0
