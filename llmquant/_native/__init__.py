"""Where the build puts the native library, if there is a compiler; `kernels/cpu.py` opens it."""
