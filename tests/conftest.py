"""What several rooms share: synthetic checkpoints, made once per session, and one thread per test process."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts: the tests run in parallel, their children too

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on the CPU

SCRIPTS = Path(__file__).parent.parent / "scripts"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_checkpoint(arch="qwen3", layers=3)`: a directory made by scripts/make_tiny.py. Do not write into it."""
    sys.path.insert(0, str(SCRIPTS))
    from make_tiny import Spec, make_tiny

    made: dict[Spec, Path] = {}

    def make(**options: object) -> Path:
        spec = Spec(**options)
        if spec not in made:
            made[spec] = tmp_path_factory.mktemp(spec.arch)
            make_tiny(made[spec], spec)
        return made[spec]

    return make


@pytest.fixture(scope="session")
def packed(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`packed("qwen3")`: that of `make_checkpoint`, quantized as `runs.recipe` says. Do not write into it."""
    from runs import packer

    return packer(lambda arch: make_checkpoint(arch=arch), tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """A Llama of two layers, hidden size 64, bf16, with a tokenizer and a chat template. Do not write into it."""
    return make_checkpoint()
