"""The numerics: pure functions on tensors, no input or output."""
