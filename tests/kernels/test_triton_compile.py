"""The compiler's word on the Triton kernels, for GPUs that are not here: tensor cores, asynchronous copies, no spills.

Triton decides when it is imported whether it interprets, so this file compiles in a process of its own.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

TARGETS = {80: ("mma.sync.aligned.m16n8k16",), 90: ("mma.sync.aligned.m16n8k16", "wgmma.mma_async")}


def test_tiles_of_every_size_compile_without_spills() -> None:
    told = os.environ | {"TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False, env=told)
    assert ran.returncode == 0, ran.stderr
    *lines, last = ran.stdout.splitlines()
    assert last == "sizes of 1 compile"
    assert len(lines) == 16
    for line in lines:
        assert "tensor cores, asynchronous copies, 0 bytes spilled, 0 of stack" in line, lines


def compiled(capability: int, tokens: int, dtype: str, symmetric: bool, group: int) -> tuple[str, str]:
    """PTX of the product, and what the assembler says of it."""
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from llmquant.kernels import triton, tuning
    from llmquant.scheme import Scheme

    kernel = triton._linear
    tile, at_once, split, warps, stages = tuning.default(8192, 8192, tokens, 256, 132)
    constants = triton._constants(8192, Scheme(4, group)) | {"RAW": at_once == tuning.FEW}
    constants |= {"TILE": tile, "TOKENS": at_once, "SPLIT": split, "bias": None}
    types = {"x": f"*{dtype}", "codes": "*i32", "scales": "*bf16", "zeros": "*u8"}
    types["y"] = types["x"] if split == 1 else "*fp32"
    if symmetric:
        constants["zeros"] = None
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    made = compiler.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": triton.FUSED},
    )
    assemble = [get_ptxas(capability).path, "-v", f"-arch=sm_{capability}{'a' if capability == 90 else ''}"]
    said = subprocess.run(
        [*assemble, "-o", os.devnull, "-"], input=made.asm["ptx"], capture_output=True, text=True, check=True
    )
    return made.asm["ptx"], said.stderr


def compile_with_ones() -> None:
    """Triton makes a constant of every number that is 1, and a constant knows less than a number does."""
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llmquant.kernels import triton
    from llmquant.scheme import MAX_SCALE, MIN_SCALE
    from llmquant.solve import triton as solver

    scales = {"SMALLEST": MIN_SCALE, "LARGEST": MAX_SCALE}
    weight = {"BITS": 4, "BLOCKS": 1, "PER_ROW": 0, "TILE": 32}
    kernels = {
        triton._linear: weight | {"RAW": True, "TOKENS": 16, "SPLIT": 2},
        triton._add: {"SPLIT": 2, "BLOCK": 1024},
        triton._dequantize: weight,
        solver._round_tile: {"MOST": 15, "COLUMNS": 1, "ROWS": 32},
        solver._search_tile: scales | {"MOST": 15, "MIDPOINT": 8, "COLUMNS": 1, "ROWS": 16},
    }
    pointers = {"x": "*bf16", "codes": "*i32", "bias": "*fp32", "y": "*bf16", "weight": "*bf16"}
    floats = "scales", "zeros", "parts", "work", "U", "pivots", "tried"
    pointers |= dict.fromkeys(floats, "*fp32")
    for kernel, constants in kernels.items():
        ones = dict.fromkeys((name for name in kernel.arg_names if name not in pointers), 1) | constants
        signature = {name: "constexpr" if name in ones else pointers[name] for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=ones)
        compiler.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": triton.FUSED})
    print("sizes of 1 compile")


def report() -> None:
    for capability, instructions in TARGETS.items():
        for tokens in (1, 32, 64, 256):
            for dtype, symmetric, group in (("bf16", True, 128), ("fp16", False, 64)):
                ptx, said = compiled(capability, tokens, dtype, symmetric, group)
                facts = [
                    "tensor cores" if any(one in ptx for one in instructions) else "no tensor cores",
                    "asynchronous copies" if "cp.async" in ptx else "no asynchronous copies",
                    "0 bytes spilled" if "0 bytes spill stores, 0 bytes spill loads" in said else "spills",
                    "0 of stack" if "0 bytes stack frame" in said else "a stack frame",
                ]
                print(f"sm_{capability}, {tokens} tokens, {dtype}, groups of {group}: {', '.join(facts)}")


if __name__ == "__main__":
    report()
    compile_with_ones()
