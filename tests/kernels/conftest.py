"""The emulated CUDA library, built once for all processes of a test run."""

import fcntl
import os
import shutil
import subprocess

import pytest
from emulated_cuda import SOURCES, Emulator


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler on the PATH")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    library = shared / "llmquant_cuda_emulated.so"
    with (shared / "llmquant_cuda_emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            sources = map(str, [*sorted(SOURCES.glob("*.cu")), SOURCES / "emulated.cpp"])
            options = (
                "-std=c++17",
                "-O1",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-Wno-unknown-pragmas",
                "-shared",
                "-fPIC",
                "-x",
                "c++",
            )
            unfinished = library.with_suffix(".unfinished")
            subprocess.run([compiler, *options, *sources, "-o", str(unfinished)], check=True)
            unfinished.rename(library)
    return Emulator(library)
