"""Killed anywhere, a run continues to the same bytes; until then nothing looks complete."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crash import Fault, Outcome, Solved, digests, run

from llmquant.errors import LlmquantError
from llmquant.pipeline import Options
from llmquant.recipe import Recipe
from llmquant.runtime.loader import load
from llmquant.verify import verify_checkpoint

SHARDED = 20_000  # bytes to a file, so that each layer is a file or two
MODULES = 7  # linears of a Llama layer


@pytest.mark.parametrize("shard_bytes", [None, SHARDED], ids=["merged", "sharded"])
@pytest.mark.parametrize("action", ["kill before", "kill after"])
def test_killed_at_every_durable_operation(
    action: str, shard_bytes: int | None, model: Path, recipe: Recipe, tmp_path: Path
) -> None:
    whole = run(model, tmp_path / "whole", recipe, shard_bytes=shard_bytes)
    expected = digests(tmp_path / "whole")
    assert whole.operations > 30
    for at in range(1, whole.operations + 1):
        out = tmp_path / f"killed-{at}"
        assert run(model, out, recipe, Fault(at, action), shard_bytes=shard_bytes).killed
        check_incomplete(out)
        committed = committed_layers(out)
        again = run(model, out, recipe, shard_bytes=shard_bytes)
        assert again.error is None, (at, again.error)
        assert digests(out) == expected, at
        assert again.solved <= (2 - committed) * MODULES, at  # what was committed is not done again
        shutil.rmtree(out)
    print(f"{action}, {'sharded' if shard_bytes else 'merged'}: {whole.operations} of {whole.operations} identical")


def check_incomplete(out: Path) -> None:
    """A loader either refuses the directory, or it is whole already and only the journal remains to be removed."""
    if (out / "config.json").exists():
        load(out)
        return
    with pytest.raises(LlmquantError):
        load(out)
    with pytest.raises(LlmquantError):
        verify_checkpoint(out)


def committed_layers(out: Path) -> int:
    journal = out / ".llmquant" / "journal.jsonl"
    lines = journal.read_bytes().splitlines() if journal.is_file() else []
    return max(0, len(lines) - 2)  # the fingerprint, and the tensors outside of the layers


def test_killed_again_and_again(model: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Every continuation is killed, too, one durable operation further than the last."""
    run(model, tmp_path / "whole", recipe)
    out, at = tmp_path / "out", 1
    while run(model, out, recipe, Fault(at)).killed:
        at += 3
        assert at < 200
    assert digests(out) == digests(tmp_path / "whole")
    assert at > 10


@pytest.mark.parametrize("code", ["ENOSPC", "EIO"])
def test_the_disk_fails_at_every_durable_operation(code: str, model: Path, recipe: Recipe, tmp_path: Path) -> None:
    operations = run(model, tmp_path / "whole", recipe).operations
    expected = digests(tmp_path / "whole")
    for at in range(1, operations + 1, 2):
        out = tmp_path / f"failed-{at}"
        failed = run(model, out, recipe, Fault(at, code))
        if failed.error is not None:
            assert "\n" not in failed.error
            assert str(tmp_path) in failed.error
            assert {"ENOSPC": "No space left", "EIO": "Input/output error"}[code] in failed.error
            assert not list(out.rglob(".tmp-*.safetensors"))
        assert run(model, out, recipe).error is None, at
        assert digests(out) == expected, at
        shutil.rmtree(out)


def test_killed_at_random_moments(model: Path, recipe: Recipe, tmp_path: Path) -> None:
    run(model, tmp_path / "whole", recipe)
    expected = digests(tmp_path / "whole")
    rng = random.Random(0)
    command = [sys.executable, "-c", CHILD, str(model), "", recipe.to_yaml()]
    kills = 0
    for n in range(10):
        command[4] = str(tmp_path / f"random-{n}")
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()  # imported and about to begin
        time.sleep(rng.uniform(0.0, 1.0))
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
        assert run(model, Path(command[4]), recipe).error is None
        assert digests(Path(command[4])) == expected
    assert kills >= 5  # else the moments were too late to mean anything


CHILD = """
import sys, torch, yaml
torch.set_num_threads(1)
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
print("ready", flush=True)
quantize(sys.argv[1], sys.argv[2], Recipe.from_dict(yaml.safe_load(sys.argv[3])))
"""


def test_power_loss_before_the_sync_of_a_shard(model: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Renamed but with its bytes lost: the journal does not know the shard yet, so the layer is made again."""
    run(model, tmp_path / "whole", recipe)
    out = tmp_path / "out"
    run(model, out, recipe, Fault(24, "kill after"))
    parts = sorted((out / ".llmquant").glob("part-*.safetensors"))
    committed = (out / ".llmquant" / "journal.jsonl").read_text()
    lost = [part for part in parts if part.name not in committed]
    for part in lost:
        part.write_bytes(part.read_bytes()[:100])
    assert run(model, out, recipe).error is None
    assert digests(out) == digests(tmp_path / "whole")


def test_a_committed_shard_that_was_altered_is_refused(model: Path, recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after_first_layer(model, out, recipe)
    part = sorted((out / ".llmquant").glob("part-*.safetensors"))[1]
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    again = run(model, out, recipe)
    assert again.error is not None
    assert f"{part}: is not what this run wrote; start anew with --no-resume" in again.error
    assert run(model, out, recipe, options=Options(resume=False)).error is None
    verify_checkpoint(out)


def stop_after_first_layer(model: Path, out: Path, recipe: Recipe) -> Outcome:
    """A run that ends, by an error of the disk, once its first layer is committed."""

    class Full(Solved):
        def finished(self, unit: object) -> None:
            from llmquant.errors import OutputError

            self.units = getattr(self, "units", 0) + 1
            if self.units == 2:
                raise OutputError("stopped by the test")

    outcome = run(model, out, recipe, observer=Full())
    assert outcome.error == "stopped by the test"
    return outcome


@pytest.mark.parametrize("tail", [b"{", b'{"body":', b"\x00" * 40])
def test_a_torn_journal_tail_is_dropped(tail: bytes, model: Path, recipe: Recipe, tmp_path: Path) -> None:
    run(model, tmp_path / "whole", recipe)
    out = tmp_path / "out"
    stop_after_first_layer(model, out, recipe)
    with (out / ".llmquant" / "journal.jsonl").open("ab") as journal:
        journal.write(tail)
    assert run(model, out, recipe).error is None
    assert digests(out) == digests(tmp_path / "whole")


def test_a_flipped_journal_byte_is_refused(model: Path, recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after_first_layer(model, out, recipe)
    journal = out / ".llmquant" / "journal.jsonl"
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 4
    journal.write_bytes(data)
    assert "damaged" in (run(model, out, recipe).error or "")
