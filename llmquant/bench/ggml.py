"""llama.cpp's product through the C interface of ggml, with the libraries that come with `llama-cpp-python`."""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

F32, Q4_0 = 0, 2  # enum ggml_type
TENSORS = 16  # that a context has room for


class _InitParams(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """The CPU backend, with as many threads as torch has, and weights repacked as llama.cpp repacks them at load."""

    def __init__(self) -> None:
        spec = find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise OSError("llama-cpp-python is not installed")
        root = Path(spec.origin).parent / "lib"
        self._base = ctypes.CDLL(str(root / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self._cpu = ctypes.CDLL(str(root / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        self._backend = self._call(self._cpu.ggml_backend_cpu_init)
        self._cpu.ggml_backend_cpu_set_n_threads(ctypes.c_void_p(self._backend), torch.get_num_threads())
        self._repacked = self._repacking_buffer()
        self._products: dict[int, tuple[Any, Any, Any]] = {}

    @staticmethod
    @cache
    def shared() -> "Ggml":
        return Ggml()

    def product(self, weight: Tensor, m: int, n: int, kind: int) -> Callable[[Tensor], Tensor]:
        """A product with the bytes of a weight [m, n] of a ggml type."""
        held = self._context()
        W = self._call(self._base.ggml_new_tensor_2d, held, kind, ctypes.c_int64(n), ctypes.c_int64(m))
        self._call(self._base.ggml_backend_alloc_ctx_tensors_from_buft, held, ctypes.c_void_p(self._repacked))
        data, size = ctypes.c_void_p(weight.data_ptr()), ctypes.c_size_t(weight.nbytes)
        self._base.ggml_backend_tensor_set(ctypes.c_void_p(W), data, ctypes.c_size_t(0), size)
        graphs = cache(lambda count: self._graph(W, m, n, count))

        def call(x: Tensor) -> Tensor:
            graph, into, out = graphs(len(x))
            y = torch.empty(len(x), m)
            self._copy(self._base.ggml_backend_tensor_set, into, x)
            self._base.ggml_backend_graph_compute(ctypes.c_void_p(self._backend), ctypes.c_void_p(graph))
            self._copy(self._base.ggml_backend_tensor_get, out, y)
            return y

        return call

    def _graph(self, W: int, m: int, n: int, count: int) -> tuple[int, int, int]:
        """A graph of one product with `count` tokens, its input and its output."""
        context = self._context()
        x = self._call(self._base.ggml_new_tensor_2d, context, F32, ctypes.c_int64(n), ctypes.c_int64(count))
        y = self._call(self._base.ggml_mul_mat, context, ctypes.c_void_p(W), ctypes.c_void_p(x))
        graph = self._call(self._base.ggml_new_graph, context)
        self._base.ggml_build_forward_expand(ctypes.c_void_p(graph), ctypes.c_void_p(y))
        self._call(self._base.ggml_backend_alloc_ctx_tensors, context, ctypes.c_void_p(self._backend))
        return graph, x, y

    def _context(self) -> ctypes.c_void_p:
        overhead = self._call(self._base.ggml_tensor_overhead, result=ctypes.c_size_t)
        graph = self._call(self._base.ggml_graph_overhead, result=ctypes.c_size_t)
        params = _InitParams(TENSORS * overhead + graph, None, no_alloc=True)
        return ctypes.c_void_p(self._call(self._base.ggml_init, params))

    def _repacking_buffer(self) -> int:
        """The kind of buffer that rearranges a weight for this processor as it is filled, or the plain one."""
        registry = self._call(self._cpu.ggml_backend_cpu_reg)
        device = self._call(self._base.ggml_backend_reg_dev_get, ctypes.c_void_p(registry), ctypes.c_size_t(0))
        name = b"ggml_backend_dev_get_extra_bufts"
        found = self._call(self._base.ggml_backend_reg_get_proc_address, ctypes.c_void_p(registry), name)
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(found)(device) if found else None
        for kind in kinds or ():
            if kind is None:
                break
            label = self._call(self._base.ggml_backend_buft_name, ctypes.c_void_p(kind), result=ctypes.c_char_p)
            if b"REPACK" in label.upper():
                return int(kind)
        return int(self._call(self._base.ggml_backend_get_default_buffer_type, ctypes.c_void_p(self._backend)))

    def _copy(self, function: Any, tensor: int, values: Tensor) -> None:
        data, size = ctypes.c_void_p(values.data_ptr()), ctypes.c_size_t(values.nbytes)
        function(ctypes.c_void_p(tensor), data, ctypes.c_size_t(0), size)

    @staticmethod
    def _call(function: Any, *arguments: Any, result: Any = ctypes.c_void_p) -> Any:
        function.restype = result
        value = function(*arguments)
        if value is None and result is ctypes.c_void_p and function.__name__ != "ggml_backend_reg_get_proc_address":
            raise OSError(f"{function.__name__} failed")
        return value
