"""`make cuda-check`: what it makes of the kernels, where there is a CUDA compiler."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "cuda_check.py"
sys.path.insert(0, str(SCRIPT.parent))
from cuda_check import (  # noqa: E402
    Kernel,
    find_disassembler,
    find_nvcc,
    has_fence_between_products,
    moves_addresses,
    uses_sums_early,
)


def run(environment: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc on this machine")
@pytest.mark.skipif(find_disassembler() is None, reason="there is no cuobjdump on this machine")
def test_kernels_compile_without_spills_and_with_their_instructions() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    for arch in ("80", "90a"):
        assert any(line.split()[1:2] == [arch] or f"  {arch} " in line for line in done.stdout.splitlines())
    assert done.stdout.rstrip().endswith(" 0 with problems")
    assert "stream<" in done.stdout
    assert "multiply_tiles<" in done.stdout
    assert "multiply_groups<" in done.stdout


def test_it_says_that_there_is_no_compiler(tmp_path: Path) -> None:
    done = run({**os.environ, "PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr == "error: there is no nvcc on the PATH or in CUDA_HOME; install the CUDA toolkit\n"


def test_problems_are_found() -> None:
    counts = {"HMMA": 8, "HGMMA": 0, "LDSM": 2, "LDGSTS": 0, "LDG.128": 4, "UBLKCP": 2, "UTMALDG": 1, "local": 3}
    found = {"ahead": False, "warned": False, "fenced": True, "early": True, "moved": True}
    kernel = Kernel("80", "_Z6stream", 128, 8, 12, counts, **found)
    assert kernel.problems("stream<Bf16, true>") == [
        "8 bytes of stack",
        "12 bytes spilled",
        "3 accesses to local memory",
        "no load before it waits",
        "a fence of the device in its loop",
        "sums are used before they are there",
        "addresses that are not known to be uniform",
        "no LDGSTS",
    ]
    none = dict.fromkeys(counts, 0)
    plain = Kernel("80", "_Z4pack", 20, 0, 0, none, **dict.fromkeys(found, False) | {"ahead": True})
    assert plain.problems("pack_codes") == []
    copies = none | {"UBLKCP": 1, "UTMALDG": 1}
    hopper = plain._replace(architecture="90a", name="_Z15multiply_groups", instructions=copies, warned=True)
    assert hopper.problems("multiply_groups<Bf16, false, 64, 0>") == ["wgmma is serialized", "no HGMMA"]
    boxed = hopper._replace(instructions=copies | {"HGMMA": 8, "STSM": 16, "UTMASTG": 0}, warned=False)
    assert boxed.problems("multiply_groups<Bf16, false, 256, 8, 1, true>") == ["no UTMASTG"]
    assert boxed.problems("multiply_groups<Bf16, false, 256, 8, 1, false>") == []
    assert hopper._replace(architecture="80", warned=False).problems("multiply_groups<Bf16, false, 64, 0>") == []


FENCES, EARLY, MOVED = has_fence_between_products, uses_sums_early, moves_addresses


@pytest.mark.parametrize(
    ("check", "listing", "found"),
    [
        (FENCES, "HGMMA.64x8x16.F32 R24 ; MEMBAR.ALL.GPU ; HGMMA.64x8x16.F32 R24 ;", True),
        (FENCES, "HMMA.16816.F32 R4 ; MEMBAR.SC.GPU ; HMMA.16816.F32 R4 ;", True),
        (FENCES, "HMMA.16816.F32 R4 ; MEMBAR.ALL.CTA ; HMMA.16816.F32 R4 ;", False),
        (FENCES, "MEMBAR.ALL.GPU ; HMMA.16816.F32 R4 ; HMMA.16816.F32 R4 ; MEMBAR.ALL.GPU ;", False),
        (FENCES, "MEMBAR.ALL.GPU ;", False),
        (EARLY, "HGMMA.64x8x16.F32 R24 ; FMUL R2, R24, R1 ; WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", True),
        (EARLY, "HGMMA.64x8x16.F32 R24 ; HFMA2.BF16 R2, R3, R1 ; DEPBAR.LE gsb0, 0x0 ; FMUL R2, R24, R1 ;", False),
        (EARLY, "FMUL R2, R24, R1 ; HGMMA.64x8x16.F32 R24 ; WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", False),
        (EARLY, "FMUL R2, R24, R1 ;", False),
        (MOVED, "HGMMA.64x8x16.F32 R24 ; R2UR UR4, R2 ; HGMMA.64x8x16.F32 R24 ;", True),
        (MOVED, "R2UR UR4, R2 ; HGMMA.64x8x16.F32 R24 ; UIADD3 UR4 ; HGMMA.64x8x16.F32 R24 ; R2UR UR4 ;", False),
    ],
)
def test_a_listing_says_what_is_wrong(check: Callable[[str], bool], listing: str, found: bool) -> None:
    assert check(listing) == found
