"""Broken input, a broken place to write to, a second run, a changed run: one line, and nothing that looks complete."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crash import Fault, Outcome, in_child, run
from safetensors.torch import load_file, save_file

from llmquant.errors import LlmquantError
from llmquant.pipeline import Options, quantize
from llmquant.recipe import Recipe

Break = Callable[[Path], None]


def edit_config(**values: object) -> Break:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def set_weight(value: float) -> Break:
    def change(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    return change


def truncate(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", (directory / "model.safetensors").stat().st_size - 100)


def shard(directory: Path) -> dict[str, str]:
    """Turn the single file into an indexed one."""
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    names = load_file(directory / "model-00001-of-00001.safetensors")
    return dict.fromkeys(names, "model-00001-of-00001.safetensors")


def index(change: Callable[[dict[str, str]], None]) -> Break:
    def write(directory: Path) -> None:
        weight_map = shard(directory)
        change(weight_map)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


BROKEN: dict[str, tuple[Break, str]] = {
    "truncated shard": (truncate, "was cut short"),
    "empty shard": (lambda d: (d / "model.safetensors").write_bytes(b""), "is empty"),
    "git-lfs pointer": (
        lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
    "missing shard": (
        index(lambda m: m.update({"model.norm.weight": "model-00002-of-00001.safetensors"})),
        "model-00002-of-00001.safetensors",
    ),
    "path out of the directory": (
        index(lambda m: m.update({"model.norm.weight": "../x.safetensors"})),
        "is not a plain file name",
    ),
    "absolute path": (
        index(lambda m: m.update({"model.norm.weight": "/etc/x.safetensors"})),
        "is not a plain file name",
    ),
    "tensor in no shard": (
        index(lambda m: m.update({"extra": "model-00001-of-00001.safetensors"})),
        "extra: is missing",
    ),
    "unlisted tensor": (index(lambda m: m.pop("model.norm.weight") and None), "model.norm.weight: is not in"),
    "pickle only": (pickled, "convert the model first"),
    "NaN weight": (set_weight(float("nan")), "model.layers.1.mlp.up_proj.weight: nan at index [3, 5]"),
    "Inf weight": (set_weight(float("inf")), "model.layers.1.mlp.up_proj.weight: inf at index [3, 5]"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: not valid JSON"),
    "unknown architecture": (edit_config(model_type="never_heard_of"), "never_heard_of"),
    "wrong kind of value": (edit_config(hidden_size="64"), "'hidden_size' expected int"),
    "language model that is none": (edit_config(model_type="llava", text_config="llama"), "'text_config'"),
    "code needed": (edit_config(auto_map={"AutoModelForCausalLM": "evil.Model"}), "trust_remote_code"),
    "kernel from the Hub": (edit_config(_attn_implementation_internal="x/y"), "foreign code"),
    "wrong sizes": (edit_config(intermediate_size=96), "config.json asks for (96, 32)"),
    "vocabulary too small": (edit_config(vocab_size=16), "outside the model's vocabulary of 16"),
    "no tokenizer": (
        lambda d: [p.unlink() for p in d.glob("*tokenizer*")] and None,
        "its tokenizer cannot be loaded",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(case: str, model: Path, recipe: Recipe, tmp_path: Path) -> None:
    breaks, words = BROKEN[case]
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    breaks(broken)
    with pytest.raises(LlmquantError) as caught:
        quantize(broken, tmp_path / "out", recipe)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()


CALIBRATIONS = {
    "empty": ("c.jsonl", b"", "holds no documents"),
    "empty text": ("c.txt", b"  \n", "is empty"),
    "not JSON": ("c.jsonl", b'{"text": "a"}\n{oops\n', "line 2"),
    "no usable key": ("c.jsonl", b'{"body": "a"}\n', "line 1"),
    "not UTF-8": ("c.txt", b"\xff\xfe\xff", "UTF-8"),
    "out of the vocabulary": ("c.jsonl", b'{"input_ids": [1, 2, 3, 4, 5, 6, 7, 99999]}\n', "99999"),
    "too short": ("c.jsonl", b'{"input_ids": [1, 2]}\n', "no sequence of 8 tokens"),
}


@pytest.mark.parametrize("case", CALIBRATIONS)
def test_broken_calibration(case: str, model: Path, tmp_path: Path) -> None:
    name, content, words = CALIBRATIONS[case]
    (tmp_path / name).write_bytes(content)
    recipe = Recipe.from_dict({"calibration": {"source": str(tmp_path / name), "samples": 2, "seq_len": 24}})
    with pytest.raises(LlmquantError) as caught:
        quantize(model, tmp_path / "out", recipe)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_written_to(model: Path, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    places = {
        model: "lie in one another",
        model / "inside": "lie in one another",
        model.parent: "lie in one another",
        tmp_path / "file": "is not a directory",
        tmp_path / "file" / "below": "cannot write",
        tmp_path / "foreign": "holds files that llmquant did not make",
        Path("/proc/llmquant"): "cannot write",  # read-only even for root
    }
    for out, words in places.items():
        with pytest.raises(LlmquantError, match=words):
            quantize(model, out, recipe)
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.txt"]


def test_a_full_disk_and_then_room(model: Path, recipe: Recipe, tmp_path: Path) -> None:
    """A limit on the size of a file stands in for a full disk: it is real, and needs no rights."""

    def limited() -> Outcome:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
        try:
            quantize(model, tmp_path / "out", recipe)
        except LlmquantError as error:
            return Outcome(False, str(error), 0, 0)
        return Outcome(False, None, 0, 0)

    outcome = in_child(limited)
    assert outcome.error is not None
    assert "cannot write" in outcome.error
    assert "free space" in outcome.error
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    assert run(model, tmp_path / "out", recipe).error is None


def changed_input(model: Path) -> Path:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def test_a_changed_run_is_refused(model: Path, recipe: Recipe, calibration: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(model, tmp_path / "model"))
    out = tmp_path / "out"
    assert run(own, out, recipe, Fault(24)).killed
    other = recipe.model_copy(update={"seed": 1})
    assert "recipe.seed was 0, is now 1" in (run(own, out, other).error or "")

    def on_two_threads() -> Outcome:
        torch.set_num_threads(2)
        return run(own, out, recipe)

    assert "machine.threads was 1, is now 2" in (in_child(on_two_threads).error or "")

    def with_another_version() -> Outcome:
        import llmquant.plan

        llmquant.plan.__version__ = "0.0.1"
        return run(own, out, recipe)

    assert "versions.llmquant was" in (in_child(with_another_version).error or "")
    changed_input(own)
    assert "input.files.model.safetensors" in (run(own, out, recipe).error or "")
    assert run(own, out, recipe, options=Options(resume=False)).error is None


def test_input_that_changes_during_the_run(model: Path, recipe: Recipe, tmp_path: Path) -> None:
    from crash import Solved

    own = Path(shutil.copytree(model, tmp_path / "model"))

    class Meddle(Solved):
        def finished(self, unit: object) -> None:
            changed_input(own)

    outcome = run(own, tmp_path / "out", recipe, observer=Meddle())
    assert "model.safetensors: changed since it was opened" in (outcome.error or "")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_and_locks_at_the_command_line(
    signum: int, code: int, make_checkpoint: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    model = make_checkpoint(layers=24, hidden=128, intermediate=256)
    command = [
        sys.executable, "-m", "llmquant.cli", "quantize", str(model), "-o", str(tmp_path / "out"),
        "--calibration", str(calibration), "--samples", "3", "--seq-len", "24", "--group-size", "32",
    ]  # fmt: skip
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "out" / ".llmquant" / "journal.jsonl"
    while not journal.is_file() or len(journal.read_bytes().splitlines()) < 3:
        assert first.poll() is None
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGSTOP)
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert f"locked by pid {first.pid}" in second.stderr
    os.kill(first.pid, signal.SIGCONT)
    first.send_signal(signum)
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == code
    assert stderr.splitlines()[-1] == "stopped; finished layers are kept, the same command continues"
    assert not (tmp_path / "out" / "config.json").exists()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_odd_surroundings_change_no_byte(model: Path, recipe: Recipe, tmp_path: Path) -> None:
    odd = tmp_path / "100 % ünïcode \u6a21"
    odd.mkdir()
    (odd / "recipe.yaml").write_text(recipe.to_yaml())
    outputs = []
    for name, environment in {"plain": {}, "odd": {"LC_ALL": "C", "TERM": "dumb", "TZ": "Asia/Kathmandu"}}.items():
        out = odd / name
        clean = {k: v for k, v in os.environ.items() if not (name == "odd" and k in ("HOME", "LANG"))}
        command = [sys.executable, "-m", "llmquant.cli", "quantize", model, "-o", out, "--recipe", odd / "recipe.yaml"]
        done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append((out / "SHA256SUMS").read_bytes())
    assert outputs[0] == outputs[1]
