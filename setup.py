"""The native build: CMake makes llmquant/_native/llmquant_cpu.so and, where torch is installed already, its binding
llmquant_torch.so; pyproject.toml holds everything else.

LLMQUANT_NATIVE=0 leaves it out, LLMQUANT_NATIVE=1 makes its failure an error. By default an installation without CMake
or a C++ compiler goes on without it: llmquant then computes with torch alone, and says so.

Where nvcc and a torch with CUDA are installed, llmquant/_native/llmquant_cuda.so is made, too, with its binding
llmquant_torch_cuda.so. LLMQUANT_CUDA=0 leaves them out, LLMQUANT_CUDA=1 asks for them whatever torch is there (without
one, for the library alone), and makes their failure an error.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WANTED = os.environ.get("LLMQUANT_NATIVE", "")
KERNELS, BINDING = "llmquant._native.llmquant_cpu", "llmquant._native.llmquant_torch"
CUDA_KERNELS, CUDA_BINDING = "llmquant._native.llmquant_cuda", "llmquant._native.llmquant_torch_cuda"


def torch_directory() -> str:
    """Of the installed package, whose headers the binding needs; empty where there is none, as in an isolated build."""
    spec = find_spec("torch")  # not imported, which takes seconds
    return str(Path(spec.origin).parent) if spec and spec.origin else ""


TORCH = torch_directory()
CUDA_WANTED = os.environ.get("LLMQUANT_CUDA", "")


def cuda_refusal() -> str:
    """Why the CUDA kernels are left out; empty if they are built."""
    if WANTED == "0":
        return "LLMQUANT_NATIVE=0 leaves out all kernels"
    if CUDA_WANTED in ("0", "1"):
        return "" if CUDA_WANTED == "1" else "LLMQUANT_CUDA=0 leaves them out"
    version = Path(TORCH) / "version.py"
    if not (TORCH and version.is_file() and re.search(r"^cuda[^=]*= '", version.read_text(), re.MULTILINE)):
        return "there is no torch with CUDA; LLMQUANT_CUDA=1 builds them anyway"
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return "" if shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin") else "there is no nvcc"


class CMakeBuild(build_ext):
    """Runs CMake in place of a compiler."""

    def run(self) -> None:
        refusal = cuda_refusal()
        sys.stderr.write(f"llmquant: without CUDA kernels: {refusal}\n" if refusal else "llmquant: with CUDA kernels\n")
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # no Python in it, so no Python version in its name

    def build_extension(self, ext: Extension) -> None:
        if ext.name in (BINDING, CUDA_BINDING):
            return  # the build of their kernels makes them, too
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        for made in (KERNELS, BINDING) if ext.name == KERNELS else (CUDA_KERNELS, CUDA_BINDING):
            # Where the sources lie, an earlier build's would be taken for this one's if this one failed.
            (output / Path(self.get_ext_filename(made)).name).unlink(missing_ok=True)
        if ext.name == CUDA_KERNELS:
            self.build_cuda(output)
            return
        options = f"-DLLMQUANT_OUTPUT={output}", f"-DLLMQUANT_TORCH={TORCH}"
        try:
            self.cmake("-S", str(ROOT), "-B", self.build_temp, *options)
            self.cmake("--build", self.build_temp, "--parallel", "--config", "Release")
        except (OSError, subprocess.CalledProcessError) as error:
            if WANTED == "1":
                raise SystemExit(f"error: LLMQUANT_NATIVE=1: the native kernels cannot be built: {error}") from error
            sys.stderr.write(
                f"warning: llmquant goes on without its native kernels, and will be slow: {error}\n"
                "warning: install CMake 3.18 or newer and a C++17 compiler, then install llmquant again\n"
            )

    def build_cuda(self, output: Path) -> None:
        """Apart from the others: its failure costs nothing but itself."""
        build = f"{self.build_temp}/cuda"
        options = f"-DLLMQUANT_OUTPUT={output}", "-DLLMQUANT_CUDA=ON", f"-DLLMQUANT_TORCH={TORCH}"
        what = "CUDA kernels"
        try:
            self.cmake("-S", str(ROOT), "-B", build, *options)
            self.cmake("--build", build, "--parallel", "--config", "Release", "--target", "llmquant_cuda")
            if TORCH:
                what = "binding of the CUDA kernels to torch"
                self.cmake("--build", build, "--config", "Release", "--target", "llmquant_torch_cuda")
        except (OSError, subprocess.CalledProcessError) as error:
            if CUDA_WANTED == "1":
                raise SystemExit(f"error: LLMQUANT_CUDA=1: the {what} cannot be built: {error}") from error
            sys.stderr.write(f"warning: llmquant goes on without its {what}: {error}\n")

    def cmake(self, *arguments: str) -> None:
        program = shutil.which("cmake")
        if program is None:
            raise FileNotFoundError("there is no cmake on the PATH")
        subprocess.run([program, *arguments], check=True)  # noqa: S603


class AnyPythonWheel(bdist_wheel):
    """One wheel per platform: the library serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def main() -> None:
    names = [] if WANTED == "0" else [KERNELS, BINDING] if TORCH else [KERNELS]
    names += [] if cuda_refusal() else [CUDA_KERNELS, CUDA_BINDING] if TORCH else [CUDA_KERNELS]
    setup(
        ext_modules=[Extension(name, sources=[], optional="1" not in (WANTED, CUDA_WANTED)) for name in names],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
    )


main()
