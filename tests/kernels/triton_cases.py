"""Where Triton's kernels run here: on the GPU, or else in Triton's interpreter."""

import os
from importlib.util import find_spec

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def dot_of_numbers(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        """The interpreter holds bf16 as its bits, and multiplies the bits."""
        return dot(self, _widened(a), _widened(b), *rest)

    def _widened(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), float32)

    InterpreterBuilder.create_dot = dot_of_numbers
