"""The compiled libraries, and what computes on each kind of device.

LLMQUANT_BACKEND names a backend: `native` (csrc/cpu, on the CPU), `cuda` (csrc/cuda) or `triton` (both on NVIDIA GPUs),
whose absence is then an error; or `reference`, plain torch, for all devices. LLMQUANT_LIBRARY names another build of
the native library. `describe_backend` and `describe_gpu_backend` say what is used: a fallback is never silent.
"""

import ctypes
import os
from functools import cache
from importlib.util import find_spec
from itertools import count, takewhile
from pathlib import Path
from typing import NamedTuple

import torch

from llmquant.errors import RecipeError

LIBRARY = Path(os.environ.get("LLMQUANT_LIBRARY") or Path(__file__).parent / "_native" / "llmquant_cpu.so")
BINDING = LIBRARY.with_name("llmquant_torch.so")  # to torch, see csrc/torch
CUDA_LIBRARY = LIBRARY.with_name("llmquant_cuda.so")
CUDA_BINDING = LIBRARY.with_name("llmquant_torch_cuda.so")
TORCH_CUDA = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
VARIABLE = "LLMQUANT_BACKEND"
BACKENDS = ("native", "cuda", "triton", "reference")
GPU_BACKENDS = ("cuda", "triton")  # the better one first
ABI, CUDA_ABI = 7, 6
OLDEST = (8, 0)  # compute capability that csrc/cuda and Triton serve


class Library:
    """The library, opened.

    Raises:
        OSError: it is not there, or was built from other sources than this package.
    """

    def __init__(self) -> None:
        if not LIBRARY.is_file():
            raise OSError(f"there is no {LIBRARY}; install CMake and a C++ compiler, then llmquant again")
        self.functions = ctypes.CDLL(os.fspath(LIBRARY))
        if self.functions.llmquant_abi() != ABI:
            raise OSError(f"{LIBRARY} belongs to another version; install llmquant again")
        self.functions.llmquant_level.restype = ctypes.c_char_p
        self.functions.llmquant_level.argtypes = [ctypes.c_int64]
        names = map(self.functions.llmquant_level, count())
        # The instruction sets that this machine can run, best first.
        self.levels = [name.decode() for name in takewhile(lambda name: name is not None, names)]

    def __str__(self) -> str:
        threads = "OpenMP" if self.functions.llmquant_threaded() else "one thread, built without OpenMP"
        return f"{self.levels[0]}, {threads}"


class CudaLibrary:
    """The library of csrc/cuda, opened; this needs no GPU.

    Raises:
        OSError: as `Library`.
    """

    def __init__(self) -> None:
        if not CUDA_LIBRARY.is_file():
            raise OSError(f"there is no {CUDA_LIBRARY}; install nvcc, then llmquant again with LLMQUANT_CUDA=1")
        self.functions = ctypes.CDLL(os.fspath(CUDA_LIBRARY))
        if self.functions.llmquant_cuda_abi() != CUDA_ABI:
            raise OSError(f"{CUDA_LIBRARY} belongs to another version; install llmquant again")
        self.functions.llmquant_cuda_message.restype = ctypes.c_char_p
        self.functions.llmquant_cuda_message.argtypes = [ctypes.c_int64]

    def call(self, name: str, *arguments: object) -> int:
        """A function of the interface by its name without the prefix; raises RuntimeError with what it says."""
        function = getattr(self.functions, f"llmquant_cuda_{name}")
        function.restype = ctypes.c_int64
        code: int = function(*arguments)
        if code < 0 or (code and name != "path"):
            raise RuntimeError(f"llmquant_cuda_{name}: {self.functions.llmquant_cuda_message(code).decode()}")
        return code

    @staticmethod
    def stream(tensor: torch.Tensor) -> ctypes.c_void_p:
        """The current one of the tensor's device."""
        return ctypes.c_void_p(torch.cuda.current_stream(tensor.device).cuda_stream)


def bind_cuda() -> str:
    """Let torch call the CUDA library without Python, by csrc/torch/cuda_ops.cpp. One clause: whether it does.

    What torch's stable ABI does not have is looked for where torch's own calls find it: in its CUDA library, and in the
    CUDA runtime that this is linked to.
    """
    if not CUDA_BINDING.is_file():
        return f"called through Python: there is no {CUDA_BINDING}; install llmquant again with --no-build-isolation"
    try:
        binding = ctypes.CDLL(os.fspath(CUDA_BINDING))
        own = ctypes.CDLL(os.fspath(TORCH_CUDA))
        given = own.aoti_torch_get_current_cuda_stream, own.cudaStreamIsCapturing
        serve = binding.llmquant_torch_cuda_serve
    except (OSError, AttributeError) as error:
        return f"called through Python: {CUDA_BINDING.name} cannot be used: {error}"
    serve.restype = ctypes.c_char_p
    reason = serve(*(ctypes.cast(function, ctypes.c_void_p) for function in given))
    if reason is None:
        return "called by torch itself"
    return f"called through Python: {CUDA_BINDING.name} cannot be used: {reason.decode()}; install llmquant again"


class Backend(NamedTuple):
    name: str  # one of BACKENDS
    why: str
    library: CudaLibrary | None = None


@cache
def find_library() -> Library | str:
    """The CPU's library, or the reason why it is not in use.

    Raises:
        RecipeError: LLMQUANT_BACKEND asks for what does not exist.
    """
    wanted = _wanted()
    if wanted == "reference":
        return f"{VARIABLE} asks for it"
    if wanted in GPU_BACKENDS:
        find_gpu_backend()  # has to be possible, even where nothing is asked of it
    try:
        return Library()
    except OSError as error:
        if wanted == "native":
            raise RecipeError(f"{VARIABLE}: the native library cannot be used: {error}") from error
        return f"the native library cannot be used: {error}"


def release_threads() -> None:
    """End the threads that this thread has computed with, before another one is to compute; see csrc/cpu/levels.h."""
    library = find_library()
    if isinstance(library, Library):
        library.functions.llmquant_release_threads()


@cache
def find_gpu_backend() -> Backend:
    """What computes on CUDA devices: our library, else Triton, else plain torch.

    Raises:
        RecipeError: LLMQUANT_BACKEND asks for what does not exist.
    """
    wanted = _wanted()
    if wanted == "reference":
        return Backend("reference", f"{VARIABLE} asks for it")
    tried = (wanted,) if wanted in GPU_BACKENDS else GPU_BACKENDS
    reasons: list[str] = []
    for name in tried:
        try:
            _check_devices()
            library = CudaLibrary() if name == "cuda" else None
            if name == "triton" and find_spec("triton") is None:
                raise OSError("Triton is not installed")
            why = "; ".join(reasons) or (f"{VARIABLE} asks for it" if wanted == name else CUDA_LIBRARY.name)
            return Backend(name, f"{why}, {bind_cuda()}" if library else why, library)
        except OSError as error:
            reasons.append(f"{name} cannot be used: {error}")
    if wanted in GPU_BACKENDS:
        raise RecipeError(f"{VARIABLE}: {reasons[0]}")
    return Backend("reference", "; ".join(reasons))


def _check_devices() -> None:
    if not torch.cuda.is_available():
        raise OSError(f"torch {torch.__version__} sees no CUDA device")
    if torch.version.cuda is None:
        raise OSError("this torch is built for other GPUs than NVIDIA's")
    if (found := min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))) < OLDEST:
        raise OSError(f"a GPU has compute capability {found[0]}.{found[1]}; {OLDEST[0]}.{OLDEST[1]} is needed")


def _wanted() -> str:
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", *BACKENDS):
        raise RecipeError(f"{VARIABLE}: {wanted!r} is no backend; use {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    return wanted


def active_backend(device: str = "cpu") -> str:
    """One of BACKENDS: what computes on this type of device."""
    if device == "cuda":
        return find_gpu_backend().name
    return "reference" if isinstance(find_library(), str) else "native"


def describe_backend() -> str:
    """One sentence: what computes on the CPU, and why."""
    library = find_library()
    return f"reference ({library})" if isinstance(library, str) else f"native ({library})"


def describe_gpu_backend() -> str:
    """One sentence: what computes on CUDA devices, and why."""
    backend = find_gpu_backend()
    return f"{backend.name} ({backend.why})"
