"""KL of two models, each larger than the memory there is, in a process that the operating system holds to a limit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = 300_000_000  # bytes beyond what Python, torch and transformers take by themselves
SHAPE = {"layers": 12, "hidden": 512, "intermediate": 4096, "heads": 8, "kv_heads": 8}
WEIGHTS = SHAPE["layers"] * (4 * 512 * 512 + 3 * 512 * 4096)

MEASURE = """
import json, resource, sys
from pathlib import Path
import psutil, torch
from llmquant.errors import LlmquantError
from llmquant.evaluate.protocol import Request
from llmquant.evaluate.run import evaluate
from llmquant.runtime.loader import load

room, text, warm, first, second = int(sys.argv[1]), *map(Path, sys.argv[2:])
request = Request(seq_len=64, max_windows=4)
evaluate(warm, text_file=text, request=request, baseline=warm)  # what is imported late, is imported now
process = psutil.Process()
limit = process.memory_info().vms + room
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
whole = "fits"
try:
    load(first, torch.float32)
except (MemoryError, RuntimeError) as error:
    whole = type(error).__name__
found = evaluate(
    first, text_file=text, request=request, baseline=second, max_memory=process.memory_info().rss + room
)
print(json.dumps(found.to_dict() | {"whole": whole}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is held to on Linux")
def test_two_models_larger_than_the_limit(make_checkpoint, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert 4 * WEIGHTS > ROOM  # one of them, in float32, alone
    first, second = make_checkpoint(**SHAPE), make_checkpoint(**SHAPE, seed=1)
    text = tmp_path / "text.txt"
    text.write_text("Not all of it fits at once. " * 80)
    command = [sys.executable, "-c", MEASURE, str(ROOM), text, tiny_checkpoint, first, second]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["whole"] != "fits"
    assert found["mean_kl"] > 0
    assert found["positions"] == 4 * 63
