"""The contract of the command line: exit codes, one line on stderr, one JSON object on stdout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROMPTS = "The quick brown fox jumps over the lazy dog. " * 60


def llmquant(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmquant.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(PROMPTS)
    return path


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that the command line itself quantized."""
    out = tmp_path_factory.mktemp("packed") / "out"
    done = llmquant(
        "quantize", tiny_checkpoint, "-o", out, "--group-size", 32, "--calibration", text, "--samples", 4,
        "--seq-len", 32, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"] is True
    return out


def test_help_does_without_what_takes_seconds_to_import() -> None:
    asked = "import sys, llmquant.cli; sys.exit(str({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


def test_verify_and_inspect(packed: Path) -> None:
    done = llmquant("verify", packed, "--json")
    assert (done.returncode, json.loads(done.stdout)["verified"]) == (0, True)
    facts = json.loads(llmquant("inspect", packed, "--json").stdout)
    assert facts["schemes"] == "int4 g32 symmetric"
    assert facts["bits_per_weight"] == 4.5
    assert facts["layers"] == 2


def test_convert(packed: Path, tmp_path: Path) -> None:
    done = llmquant("convert", packed, "-o", tmp_path / "gptq", "--to", "gptq", "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["from"], made["to"], made["linears"], made["verified"]) == ("compressed-tensors", "gptq", 14, True)
    done = llmquant("verify", tmp_path / "gptq")
    assert "as it was converted to gptq" in " ".join(done.stdout.split())
    done = llmquant("convert", packed, "-o", tmp_path / "modelopt", "--to", "modelopt")
    assert done.returncode == 1
    assert done.stderr.startswith("error: model.layers.0.self_attn.q_proj: modelopt cannot hold it: its groups")
    assert not (tmp_path / "modelopt").exists()


def test_inspect_of_the_machine() -> None:
    facts = json.loads(llmquant("inspect", "--runtime", "--json").stdout)
    assert facts["cpu"].startswith(("native (", "reference ("))
    assert facts["cuda"].startswith(("cuda (", "triton (", "reference ("))
    assert facts["cpu"] in " ".join(llmquant("inspect", "--runtime").stdout.split())
    assert llmquant("inspect").returncode == 2


def test_inspect_of_an_original_tells_what_a_run_would_cost(tiny_checkpoint: Path) -> None:
    facts = json.loads(llmquant("inspect", tiny_checkpoint, "--json").stdout)
    assert facts["quantization"] is None
    assert facts["default_run_memory_bytes"] > 0


def test_eval_with_baseline_and_gate(packed: Path, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    measure = ["eval", packed, "--text-file", text, "--seq-len", 64, "--max-windows", 2, "--baseline", tiny_checkpoint]
    done = llmquant(*measure, "--max-increase", "1000%", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["mean_kl"] > 0
    assert "64" in facts["protocol"]
    assert facts["gates"]["--max-increase"]["held"] is True
    failed = llmquant(*measure, "--max-increase", "-100%", "--json", "--junit", tmp_path / "gate.xml")
    assert failed.returncode == 3
    assert failed.stderr.splitlines()[-1].startswith("error: --max-increase: perplexity rose by")
    assert json.loads(failed.stdout)["perplexity"] == facts["perplexity"]
    assert '<testcase classname="llmquant.eval" name="--max-increase"' in (tmp_path / "gate.xml").read_text()


def test_a_search_in_vain_ends_with_the_best_and_exit_code_3(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    done = llmquant(
        "quantize", tiny_checkpoint, "-o", tmp_path / "out", "--method", "rtn", "--group-size", 32, "--samples", 4,
        "--seq-len", 32, "--max-increase=-100%", "--text-file", text, "--max-windows", 1,
        "--max-bits-per-weight", 4.5, "--json",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    outcome = json.loads(done.stdout)
    assert (outcome["held"], outcome["attempts"][-1]["increase"]) == (False, None)
    assert "error: --max-increase -100.00%: not reached in" in done.stderr
    assert (tmp_path / "out" / "config.json").is_file()
    assert "<html" in (tmp_path / "out" / "report.html").read_text()


def test_compare(packed: Path, tiny_checkpoint: Path, text: Path) -> None:
    measure = ["--text-file", text, "--seq-len", 64, "--max-windows", 2, "--no-speed", "--json"]
    done = llmquant("compare", tiny_checkpoint, packed, *measure)
    assert done.returncode == 0, done.stderr
    original, quantized = json.loads(done.stdout)["checkpoints"]
    assert (original["bits_per_weight"], quantized["bits_per_weight"]) == (16, 4.5)
    assert quantized["mean_kl"] > 0


def test_generate(packed: Path) -> None:
    done = llmquant("generate", packed, "-p", "Hello", "--max-new-tokens", 5, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["new_tokens"] == 5


def test_dry_run_writes_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = llmquant("quantize", tiny_checkpoint, "-o", tmp_path / "out", "--group-size", 64, "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert plan["linears"]["model.layers.0.mlp.down_proj"] == "int4 g64 symmetric"
    assert plan["bytes_out"] < plan["bytes_in"]
    assert not (tmp_path / "out").exists()


def test_a_recipe_file_is_followed_and_options_win(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("method: rtn\nscheme: {bits: 8, group_size: 64}\n")
    done = llmquant(
        "quantize",
        tiny_checkpoint,
        "-o",
        tmp_path / "out",
        "--recipe",
        recipe,
        "--group-size",
        32,
        "--dry-run",
        "--json",
    )
    assert json.loads(done.stdout)["recipe"]["scheme"] == {"bits": 8, "group_size": 32, "symmetric": True}


def test_sensitivity_recommends_a_recipe_that_quantize_takes(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    calibrated = ["--calibration", text, "--samples", 4, "--seq-len", 32]
    written = tmp_path / "mixed.yaml"
    done = llmquant("sensitivity", tiny_checkpoint, *calibrated, "--target-bits", 5, "-o", written, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert len(facts["linears"]) == 14
    assert facts["recommended"]["bits_per_weight"] <= 5
    dry = llmquant("quantize", tiny_checkpoint, "-o", tmp_path / "out", "--recipe", written, "--dry-run", "--json")
    assert 4.5 < json.loads(dry.stdout)["bits_per_weight"] <= 5
    table = llmquant("sensitivity", tiny_checkpoint, *calibrated)
    assert "model.layers.1.mlp.down_proj" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["quantize", "/nowhere/at/all", "-o", "{out}"], 1, "/nowhere/at/all"),
        (["quantize", "{model}", "-o", "{out}", "--bits", "5"], 1, "bits: 5 is not supported"),
        (["quantize", "{model}", "-o", "{out}", "--calibration", "none.txt"], 1, "none.txt"),
        (["quantize", "{model}", "-o", "{model}"], 1, "lie in one another"),
        (["quantize", "{model}", "-o", "{out}", "--format", "gptq", "--asym"], 1, "asymmetric GPTQ"),
        (["quantize", "{model}", "-o", "{out}", "--device", "tpu"], 2, "use auto, cpu, cuda"),
        (["quantize", "{model}", "-o", "{out}", "--max-memory", "lots"], 2, "as in 16GB"),
        (["quantize", "{model}", "-o", "{out}", "--max-increase", "5%"], 1, "--text-file, --dataset: give one"),
        (["quantize", "{model}", "-o", "{out}", "--target-size", "lots"], 2, "as in 16GB"),
        (["quantize", "{model}", "-o", "{out}", "--target-bits", "5", "--target-kl", "1"], 1, "exactly one of"),
        (
            ["quantize", "{model}", "-o", "{out}", "--target-bits", "3.9"],
            1,
            "3.9 bits per weight, but codes alone take 4",
        ),
        (["quantize", "{model}", "-o", "{out}", "--target-size", "1KB"], 1, "1000 bytes, but codes and what is not"),
        (["quantize", "{model}", "-o", "{out}", "--tensor-parallel", "0"], 2, "as in 1,2,4,8"),
        (["sensitivity", "{model}", "-o", "{out}"], 2, "a recipe needs a target"),
        (["quantize", "{model}"], 2, "--out"),
        (["quantise"], 2, "quantise"),
        (["verify", "{model}"], 1, "SHA256SUMS"),
        (["verify", "/nowhere"], 1, "/nowhere"),
        (["eval", "{model}"], 1, "--text-file"),
        (["eval", "{model}", "--text-file", "none.txt"], 1, "none.txt"),
        (["eval", "{model}", "--max-increase", "5%"], 2, "--baseline"),
        (["eval", "{model}", "--device", "tpu"], 2, "use auto, cpu, cuda"),
        (["compare", "{model}", "{out}", "--device", "tpu"], 2, "use auto, cpu, cuda"),
        (["generate", "/nowhere", "-p", "x"], 1, "/nowhere"),
        (["generate", "{model}", "-p", "x", "--device", "tpu"], 2, "use auto, cpu, cuda"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_failures(arguments: list[str], code: int, words: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = llmquant(*(a.format(model=tiny_checkpoint, out=out) for a in arguments))
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not out.exists()
