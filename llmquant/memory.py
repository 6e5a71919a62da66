"""Memory: what is left of it, what was taken at most, and the C heap, told to give it back."""

import ctypes
import resource
import sys

import psutil
import torch

_M_MMAP_THRESHOLD = -3  # mallopt(3), glibc
_THRESHOLD = 2 * 2**20


def peak() -> int:
    """The most resident memory that this process has had, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def available(device: torch.device) -> int:
    """Bytes that are left on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def return_large_blocks() -> None:
    """Have blocks of 2 MB and more, as an expert's weight is, returned to the system the moment they are freed.

    glibc raises that limit by itself to 32 MB as large blocks come and go; what is below then stays in a heap
    that fragments, and a long run creeps up: 18 % from 4 to 16 layers, measured with scripts/bench_memory.py,
    against none with the limit fixed (at 4 MB). Elsewhere than on glibc nothing is done.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
