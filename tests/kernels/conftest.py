"""Triton's kernels on the GPU, or else in Triton's interpreter."""

import os
from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
    from triton.language import bfloat16
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def dot_of_numbers(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        """The interpreter holds bf16 as its bits, and multiplies the bits."""
        return dot(self, *(_widened(operand) for operand in (a, b)), *rest)

    def _widened(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != bfloat16:
            return operand
        from triton.language import float32

        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), float32)

    InterpreterBuilder.create_dot = dot_of_numbers


@pytest.fixture
def device() -> str:
    """Where Triton's kernels run here."""
    pytest.importorskip("triton")
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
