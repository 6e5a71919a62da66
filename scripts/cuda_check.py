#!/usr/bin/env python3
"""Compile the CUDA kernels, without a GPU or a CUDA build of torch, and look at what came out: registers, spills, and
whether the instructions that they live from are there. Prints a table; exit code 1 if anything is wrong.

python scripts/cuda_check.py [--arch 80 --arch 90a]
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
ARCHITECTURES = ("80", "90a")

# Instructions, as the disassembler writes them.
INSTRUCTIONS = {
    "HMMA": r"HMMA\.16816\.F32",  # tensor cores, by a warp
    "HGMMA": r"HGMMA\.64x\d+x16\.F32",  # by a warpgroup
    "LDSM": r"LDSM\.16\.M88\.4",  # ldmatrix.x4
    "LDGSTS": r"LDGSTS\.E\S*\.128",  # cp.async of 16 bytes
    "LDG.128": r"LDG\.E\S*\.128",  # loads of 16 bytes
    "UBLKCP": r"UBLKCP\b",  # copies by the copy engine
    "UTMALDG": r"UTMALDG\.2D",  # and of boxes
    "UTMASTG": r"UTMASTG\.2D",  # of boxes, back to memory
    "STSM": r"STSM\.16\.MT88\.4",  # stmatrix.x4, transposed
    "STAS": r"STAS\b",  # st.async to another block of the cluster
    "local": r"(?:LDL|STL)\b",  # memory for what registers have no room for
}
WAIT = "ACQBULK"  # griddepcontrol.wait; ptxas may move loads across it
PRODUCT, FENCE = r"\bHG?MMA\.", r"MEMBAR\.\w+\.GPU"
GROUP_PRODUCT, ALL_DONE = r"\bHGMMA\.", r"DEPBAR\.LE gsb0, 0x0"
# Which of them kernels of a name cannot do without.
NEEDED = {r"(stream|multiply_tiles)<": ("HMMA", "LDSM", "LDGSTS", "LDG.128")}
# On sm_90a; for others they are empty.
HOPPER = {
    r"multiply_groups<": ("HGMMA", "UBLKCP", "UTMALDG"),
    r"multiply_groups<.*, true>": ("STSM", "UTMASTG"),
    r"stream_in_cluster<": ("HMMA", "LDSM", "LDGSTS", "LDG.128", "STAS"),
}


class Kernel(NamedTuple):
    """What ptxas and the disassembler say of one kernel."""

    architecture: str
    name: str  # mangled
    registers: int
    stack: int  # bytes
    spilled: int  # bytes, stored and loaded
    instructions: dict[str, int]
    ahead: bool  # weights are asked for before the kernel waits for the one before it, if it does
    warned: bool  # wgmma instructions wait for each other
    fenced: bool  # memory of the whole device is waited for between products of tensor cores
    early: bool  # sums are used before the wgmma that computes them is awaited
    moved: bool  # addresses of matrices are brought to where wgmma takes them from, again and again

    def problems(self, name: str) -> list[str]:
        found = [f"{self.stack} bytes of stack"] if self.stack else []
        found += [f"{self.spilled} bytes spilled"] if self.spilled else []
        found += [f"{self.instructions['local']} accesses to local memory"] if self.instructions["local"] else []
        found += [] if self.ahead else ["no load before it waits"]
        found += ["wgmma is serialized"] if self.warned else []
        found += ["a fence of the device in its loop"] if self.fenced else []
        found += ["sums are used before they are there"] if self.early else []
        found += ["addresses that are not known to be uniform"] if self.moved else []
        rules = NEEDED | (HOPPER if self.architecture == "90a" else {})
        needed = [kind for pattern, kinds in rules.items() if re.match(pattern, name) for kind in kinds]
        return found + [f"no {kind}" for kind in needed if not self.instructions[kind]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels and look at what came out.")
    parser.add_argument("--arch", action="append", help=f"an architecture; by default {' and '.join(ARCHITECTURES)}")
    architectures = parser.parse_args().arch or ARCHITECTURES
    nvcc, disassembler = find_nvcc(), find_disassembler()
    if nvcc is None:
        sys.exit("error: there is no nvcc on the PATH or in CUDA_HOME; install the CUDA toolkit")
    if disassembler is None:
        sys.exit("error: there is no cuobjdump on the PATH; install it with the CUDA toolkit, or the package triton")
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = [(source, arch) for arch in architectures for source in sorted(SOURCES.glob("*.cu"))]
        compiled = pool.map(lambda task: list(compile_kernels(nvcc, disassembler, *task, Path(scratch))), tasks)
        try:
            kernels = [kernel for part in compiled for kernel in part]
        except subprocess.CalledProcessError as error:
            sys.exit(f"{error.stderr.rstrip()}\nerror: {' '.join(map(str, error.cmd))} failed")
    sys.exit(1 if report(kernels) else 0)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def find_disassembler() -> str | None:
    """Of the toolkit, or the one that triton brings."""
    spec = find_spec("triton")
    triton = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else Path()
    nvcc = find_nvcc()
    beside = Path(nvcc).parent if nvcc else Path()
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=f"{beside}{os.pathsep}{triton}")


def compile_kernels(nvcc: str, disassembler: str, source: Path, architecture: str, scratch: Path) -> Iterator[Kernel]:
    output = scratch / f"{source.stem}.{architecture}.cubin"
    options = "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v"
    said = run(nvcc, *options, "-o", str(output), str(source)).stderr
    if "Compiling entry function" not in said:
        return
    code = run(disassembler, "-sass", str(output)).stdout
    listings = dict(part.split("\n", 1) for part in re.split(r"^\s*Function : ", code, flags=re.MULTILINE)[1:])
    for part in said.split("Compiling entry function '")[1:]:
        name = part[: part.index("'")]
        stack, stores, loads = numbers(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", part)
        (registers,) = numbers(r"Used (\d+) registers", part)
        listing = listings[name]
        counts = {kind: len(re.findall(pattern, listing)) for kind, pattern in INSTRUCTIONS.items()}
        before = listing.split(WAIT)[0]
        ahead = bool(re.search(r"LDG\S*\.128|LDGSTS|UBLKCP", before)) or WAIT not in listing
        warned = bool(re.search(rf"\(C75\d\d\).*'{name}'", said))
        facts = architecture, name, registers, stack, stores + loads, counts, ahead, warned
        yield Kernel(*facts, has_fence_between_products(listing), uses_sums_early(listing), moves_addresses(listing))


def has_fence_between_products(listing: str) -> bool:
    """Whether a kernel waits for memory of the whole device where it multiplies, which is in its innermost loop."""
    return any(re.search(FENCE, part) for part in re.split(PRODUCT, listing)[1:-1])


def uses_sums_early(listing: str) -> bool:
    """Whether fp32 arithmetic stands between the last product of warpgroups and where all of them are awaited.

    A compiler sees no connection between a sum and the wait for it, and the source has to say it. Numbers are made of
    codes in 16 bits, so nothing else computes in fp32 there.
    """
    waits = re.split(ALL_DONE, listing)[:-1]
    return any(re.search(r"\bF(?:MUL|ADD|FMA)\b", re.split(GROUP_PRODUCT, part)[-1]) for part in waits)


def moves_addresses(listing: str) -> bool:
    """Whether the compiler was not sure that a warp's lanes agree, which made a loop a fifth longer."""
    return any("R2UR" in part for part in re.split(GROUP_PRODUCT, listing)[1:-1])


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    tools = os.pathsep.join([str(Path(command[0]).parent), os.environ.get("PATH", "")])  # cuobjdump calls nvdisasm
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PATH": tools})


def numbers(pattern: str, text: str) -> tuple[int, ...]:
    found = re.search(pattern, text)
    if found is None:
        sys.exit(f"error: ptxas no longer says {pattern!r}; this check has to learn its words")
    return tuple(map(int, found.groups()))


def report(kernels: list[Kernel]) -> int:
    """Prints the table and returns how many kernels have problems."""
    names = readable([kernel.name for kernel in kernels])
    width = max(map(len, names), default=6)
    sys.stdout.write(f"{'kernel':{width}}  sm    registers  stack  spilled  {'  '.join(INSTRUCTIONS)}\n")
    bad = 0
    for kernel, name in zip(kernels, names, strict=True):
        counts = "  ".join(f"{count:{len(kind)}}" for kind, count in kernel.instructions.items())
        row = f"{name:{width}}  {kernel.architecture:4}  {kernel.registers:9}  {kernel.stack:5}  {kernel.spilled:7}  "
        problems = kernel.problems(name)
        bad += bool(problems)
        sys.stdout.write(row + counts + "".join(f"  <- {problem}" for problem in problems) + "\n")
    sys.stdout.write(f"{len(kernels)} kernels, {bad} with problems\n")
    return bad


def readable(names: list[str]) -> list[str]:
    """Demangled, without namespaces and parameters; as they are where there are no binutils."""
    if shutil.which("c++filt") is None:
        return names
    lines = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout.splitlines()
    lines = [re.sub(r"void |llmquant::cuda::|warpgroups::|\(anonymous namespace\)::", "", line) for line in lines]
    return [re.sub(r"\(\w+\)(?=\d)", "", line).split("(")[0] for line in lines]  # what follows is an enumerator


if __name__ == "__main__":
    main()
