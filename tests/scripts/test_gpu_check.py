"""scripts/gpu_check.sh, as far as a machine without a GPU can tell."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [shutil.which("bash") or "bash", str(SCRIPT), *map(str, arguments)]
    told = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=told)


@pytest.mark.parametrize(
    "arguments", [(), ("out", "--only"), ("out", "--only", "everything"), ("out", "--fast", "solver")]
)
def test_wrong_use_is_one_line(arguments: tuple[str, ...]) -> None:
    ran = run(*arguments)
    assert ran.returncode == 2
    assert ran.stderr == "error: usage: scripts/gpu_check.sh OUTDIR [--only kernels|solver|quantize|serve]\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_is_missing_is_named_and_nothing_written(tmp_path: Path) -> None:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "nvcc").symlink_to("/bin/true")
    ran = run(tmp_path / "out", PATH=f"{bin_}:{os.environ['PATH']}")
    assert (ran.returncode, ran.stderr) == (2, "error: torch sees no CUDA GPU on this machine\n")
    ran = run(tmp_path / "out", PATH=str(tmp_path), CUDA_HOME=str(tmp_path / "none"))
    assert ran.stderr == "error: there is no nvcc on the PATH or in CUDA_HOME; install the CUDA toolkit\n"
    assert not (tmp_path / "out").exists()


def test_every_file_that_it_names_is_there() -> None:
    words = SCRIPT.read_text().replace('"', " ").split()
    named = {word for word in words if word.startswith(("tests/", "scripts/")) and word.endswith((".py", ".sh"))}
    assert len(named) >= 8
    assert all((SCRIPT.parents[1] / word).is_file() for word in named)


def test_it_is_clean_shell() -> None:
    if shutil.which("shellcheck") is None and not (Path(sys.executable).parent / "shellcheck").exists():
        pytest.skip("there is no shellcheck")
    program = shutil.which("shellcheck") or Path(sys.executable).parent / "shellcheck"
    ran = subprocess.run([program, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
