#!/usr/bin/env python3
"""Kill a quantization at random moments and see whether the result is the same, byte for byte.

    python scripts/kill_check.py MODEL --kills 10 -- --group-size 64 --samples 8 --seq-len 256

runs `llmquant quantize MODEL` once undisturbed and then, for each kill, once with SIGKILL after a random part of the
time that took; each killed run is continued by the same command. What stands after `--` goes to `quantize`.
"""

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOG = "llmquant_log.jsonl"  # holds times, the one file that differs between equal runs


def main() -> None:
    own, _, passed = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint directory or a Hub name")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(own.split())
    rng = random.Random(options.seed)  # noqa: S311
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "llmquant.cli", "quantize", options.model, *passed.split(), "-o"]
        started = time.monotonic()
        finish([*command, f"{work}/reference"])
        duration = time.monotonic() - started
        expected = digests(Path(work) / "reference")
        sys.stdout.write(f"undisturbed: {duration:.1f} s, {len(expected)} files\n")
        failures = sum(
            not survives(command, Path(work) / f"killed-{n}", rng.uniform(0.05, 1.0) * duration, expected)
            for n in range(options.kills)
        )
    sys.stdout.write(f"{options.kills - failures} of {options.kills} killed runs gave the same bytes\n")
    sys.exit(1 if failures else 0)


def survives(command: list[str], out: Path, delay: float, expected: dict[str, str]) -> bool:
    """Kill after `delay` seconds, look, continue, compare."""
    run = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        run.wait(delay)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGKILL)
        run.wait()
    journal = out / ".llmquant" / "journal.jsonl"
    committed = max(0, len(journal.read_bytes().splitlines()) - 1) if journal.is_file() else 0
    complete = (out / "config.json").exists()
    started = time.monotonic()
    finish([*command, str(out)])
    same = digests(out) == expected
    sys.stdout.write(
        f"killed after {delay:5.1f} s with {committed:3d} units committed, "
        f"config.json {'there' if complete else 'absent'}; "
        f"continued in {time.monotonic() - started:5.1f} s: {'the same bytes' if same else 'DIFFERENT'}\n"
    )
    sys.stdout.flush()
    return same


def finish(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}: {done.stderr[-500:]}")


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.name != LOG
    }


if __name__ == "__main__":
    main()
