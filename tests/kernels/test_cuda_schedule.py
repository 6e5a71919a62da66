"""How the CUDA products share their work: every unit is done once, and sums are found where they were left."""

import ctypes

import torch
from emulated_cuda import Emulator, guarded
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 200), st.integers(1, 100), st.integers(1, 600))
def test_every_unit_is_done_once(emulator: Emulator, tiles: int, chunks: int, blocks: int) -> None:
    done = guarded(torch.zeros(tiles, chunks, dtype=torch.int32))
    numbers = map(ctypes.c_int64, (tiles, chunks, blocks))
    assert emulator.functions.llmquant_emulated_schedule(*numbers, ctypes.c_void_p(done.data_ptr())) == 0
    assert bool((done == 1).all())
