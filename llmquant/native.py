"""The native library of csrc/cpu: whether it is there, and on which instruction set it runs.

LLMQUANT_BACKEND=reference leaves it alone, LLMQUANT_BACKEND=native makes its absence an error, LLMQUANT_LIBRARY names
another build of it. What is used is said by `describe_backend`: a fallback is never silent.
"""

import ctypes
import os
from functools import cache
from itertools import count, takewhile
from pathlib import Path

from llmquant.errors import RecipeError

LIBRARY = Path(os.environ.get("LLMQUANT_LIBRARY") or Path(__file__).parent / "_native" / "llmquant_cpu.so")
BINDING = LIBRARY.with_name("llmquant_torch.so")  # to torch, see csrc/torch
VARIABLE = "LLMQUANT_BACKEND"
ABI = 5


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


@cache
def find_library() -> Library | str:
    """The library, or the reason why it is not in use.

    Raises:
        RecipeError: LLMQUANT_BACKEND asks for what does not exist.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "native", "reference"):
        raise RecipeError(f"{VARIABLE}: {wanted!r} is no backend; use native or reference")
    if wanted == "reference":
        return f"{VARIABLE} asks for it"
    try:
        return Library()
    except OSError as error:
        if wanted == "native":
            raise RecipeError(f"{VARIABLE}: the native library cannot be used: {error}") from error
        return f"the native library cannot be used: {error}"


def active_backend() -> str:
    """`native` or `reference`: what computes on the CPU."""
    return "reference" if isinstance(find_library(), str) else "native"


def describe_backend() -> str:
    """One sentence: what computes on the CPU, and why."""
    library = find_library()
    return f"reference ({library})" if isinstance(library, str) else f"native ({library})"
