#!/usr/bin/env python3
"""The tour that `make demo` gives: quantize a model, verify it, measure what it cost, let it speak.

    python scripts/demo.py MODEL WORKDIR

Every step is the public command line. The text measured on ships with CPython: its language reference, `pydoc_data`.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

LLMQUANT = str(Path(sys.executable).with_name("llmquant"))
QUESTION = "What is the capital of France?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the checkpoint to quantize")
    parser.add_argument("workdir", type=Path, help="where the text and the result go")
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    out = str(options.workdir / "int4-g64")
    text = str(write_text(options.workdir / "python-reference.txt"))

    scheme = ["--bits", "4", "--group-size", "64", "--format", "compressed-tensors"]
    llmquant("quantize", options.model, "-o", out, *scheme, "--samples", "32", "--overwrite")
    llmquant("verify", out)
    before = facts("inspect", options.model)
    after = facts("inspect", out)
    windows = ["--seq-len", "1024", "--max-windows", "8"]
    quality = facts("eval", out, "--baseline", options.model, "--text-file", text, *windows)
    answer = facts("generate", out, "-p", QUESTION, "--max-new-tokens", "32")
    report(before, after, quality, answer)


def write_text(path: Path) -> Path:
    """The language reference as plain text: the lines that only underline a title are left out."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    path.write_text(re.sub(r"^[*=\-^~]{3,}\n", "", text, flags=re.MULTILINE), encoding="utf-8")
    return path


def llmquant(*arguments: str, capture: bool = False) -> str:
    """Run one command, shown as it would be typed; stop where it stops."""
    sys.stderr.write(f"\n$ llmquant {shlex.join(arguments)}\n")
    done = subprocess.run([LLMQUANT, *arguments], stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def facts(*arguments: str) -> dict[str, Any]:
    return json.loads(llmquant(*arguments, "--json", capture=True))


def report(before: dict[str, Any], after: dict[str, Any], quality: dict[str, Any], answer: dict[str, Any]) -> None:
    original, quantized = quality["baseline_perplexity"], quality["perplexity"]
    rows = [
        ("", "original", "quantized"),
        ("size", f"{before['bytes'] / 1e6:.1f} MB", f"{after['bytes'] / 1e6:.1f} MB"),
        ("bits per weight", f"{before['bits_per_weight']:.2f}", f"{after['bits_per_weight']:.2f} (linears)"),
        ("perplexity", f"{original:.2f}", f"{quantized:.2f} ({quantized / original - 1:+.1%})"),
        ("KL divergence", "", f"{quality['mean_kl']:.4f}"),
        ("same first choice", "", f"{quality['top1_agreement']:.1%}"),
    ]
    table = "\n".join(f"{name:<18} {left:>12}   {right}".rstrip() for name, left, right in rows)
    sys.stdout.write(f"\n{QUESTION}\n> {answer['text'].strip()}\n\n{table}\n\nmeasured on {quality['protocol']}\n")


if __name__ == "__main__":
    main()
