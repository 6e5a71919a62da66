"""Wall time from load to saved files beside llm-compressor's GPTQ: same model, same tokens, in turn.

    python scripts/bench_peers.py MODEL CALIBRATION.jsonl --peer PYTHON [--dtype float32] [--rounds 3]

PYTHON is an interpreter with llmcompressor installed, which asks for other versions than we do. Each run is a process
of its own that reports the seconds between its imports and its last file. The peer computes in the dtype of the model,
or in that of --dtype: a processor without bf16 arithmetic needs minutes there for what float32 does in seconds. We
choose by ourselves.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = """
import sys, time
from llmquant.pipeline import Options, quantize
from llmquant.recipe import Recipe
model, calibration, out, samples, seq_len, _ = sys.argv[1:]
recipe = Recipe.from_dict({
    "scheme": {"group_size": 64},
    "calibration": {"source": calibration, "samples": int(samples), "seq_len": int(seq_len)},
})
started = time.perf_counter()
quantize(model, out, recipe, Options(overwrite=True))
print(f"seconds {time.perf_counter() - started}")
"""

PEER = """
import json, sys, time
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM
model, calibration, out, samples, seq_len, dtype = sys.argv[1:]
rows = [json.loads(line)["input_ids"][: int(seq_len)] for line in open(calibration)][: int(samples)]
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
started = time.perf_counter()
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
oneshot(
    model=loaded,
    dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
    recipe=GPTQModifier(config_groups={"linears": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]),
    max_seq_length=int(seq_len),
    num_calibration_samples=len(rows),
)
loaded.save_pretrained(out, save_compressed=True)
print(f"seconds {time.perf_counter() - started}")
"""


def seconds(python: str, program: str, *arguments: str) -> float:
    with tempfile.TemporaryDirectory() as out:
        command = [python, "-c", program, *arguments[:2], out, *arguments[2:]]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    return float(run.stdout.rsplit("seconds", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", help="rows of input_ids")
    parser.add_argument("--peer", required=True, help="a Python that has llmcompressor")
    parser.add_argument("--dtype", default="auto", help="that the peer loads the model in")
    parser.add_argument("--samples", default="32")
    parser.add_argument("--seq-len", default="512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    common = (args.model, args.calibration, args.samples, args.seq_len, args.dtype)
    rounds = []
    for _ in range(args.rounds):
        ours, peer = seconds(sys.executable, OURS, *common), seconds(args.peer, PEER, *common)
        rounds.append({"llmquant": ours, "llm-compressor": peer})
        print(f"llmquant {ours:.1f} s, llm-compressor {peer:.1f} s, ratio {ours / peer:.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"peer_dtype": args.dtype, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
