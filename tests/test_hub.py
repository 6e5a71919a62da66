"""push: verified first, private unless said, in one commit, resumed after a kill, patient with a busy Hub."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hub_server import HubServer
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

from llmquant import plan
from llmquant.card import EVALUATION, model_card
from llmquant.errors import CheckpointError, HubError, VerifyError
from llmquant.hub import upload
from llmquant.observer import Silent
from llmquant.pipeline import Options, quantize
from llmquant.recipe import Recipe

TOKEN = "hf_aSecretThatNobodyMaySee"  # noqa: S105
REPO = "org/tiny-int4"


@pytest.fixture(scope="module")
def finished(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized checkpoint of several shards. Do not write into it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_BYTES", 40_000)
        out = tmp_path_factory.mktemp("finished") / "model"
        recipe = {"scheme": {"group_size": 32}, "method": "gptq", "calibration": {"samples": 4, "seq_len": 32}}
        quantize(make_checkpoint(), out, Recipe.from_dict(recipe))
    assert len(list(out.glob("*.safetensors"))) > 3
    return out


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub of this process and of those that `start` starts; nobody waits between attempts."""
    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(upload, "PAUSES", (0, 0, 0))
    yield server
    server.shutdown()


def start(server: HubServer, directory: Path, *options: str) -> subprocess.Popen[str]:
    """`llmquant push` in a process of its own."""
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "llmquant.cli", "push", str(directory), REPO, *options]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def shas(directory: Path) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.safetensors")}


def check_pushed(server: HubServer, directory: Path) -> None:
    files = server.repos[REPO]["files"]
    local = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert files.keys() == local.keys() | {"README.md"}
    assert all(files[name] == content for name, content in local.items())


def test_everything_arrives_in_one_commit_and_only_the_owner_sees_it(server: HubServer, finished: Path) -> None:
    process = start(server, finished, "--base-model", "org/tiny", "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    check_pushed(server, finished)
    assert server.repos[REPO]["private"] is True
    assert sum("/commit/" in request for request in server.asked) == 1
    assert json.loads(out)["commit"].startswith(f"{server.url}/{REPO}/commit/")
    assert b"base_model: org/tiny\n" in server.repos[REPO]["files"]["README.md"]
    assert f"Bearer {TOKEN}" in server.tokens
    assert TOKEN not in out + err
    assert not any(TOKEN.encode() in content for content in server.repos[REPO]["files"].values())


def test_a_push_that_was_killed_sends_only_what_is_missing(server: HubServer, finished: Path) -> None:
    server.hold = 3
    process = start(server, finished)
    assert server.held.wait(100)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    first = server.puts()
    assert len(first) == 3
    assert len(server.objects) == 2
    assert server.repos[REPO]["files"] == {}, "half a model is to be seen"

    server.hold = None
    upload.push(finished, REPO)
    second = server.puts()[3:]
    assert not set(second) & set(first[:2])
    assert sorted([*second, *first[:2]]) == sorted(shas(finished))
    check_pushed(server, finished)

    upload.push(finished, REPO)
    assert server.puts() == first + second, "what is there was sent again"


def test_a_busy_hub_is_waited_for(server: HubServer, finished: Path) -> None:
    places = ["repos/create", "GET /api/models", "preupload", "objects/batch", "PUT", "/commit/"]
    server.faults = [fault for place in places for fault in ((place, 429, {"Retry-After": "0"}), (place, 503, {}))]
    upload.push(finished, REPO)
    assert server.faults == []
    check_pushed(server, finished)


def test_retry_after_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(upload.time, "sleep", waits.append)
    answers = [(429, "7"), (503, None), (429, "100000")]

    def call() -> str:
        if not answers:
            return "done"
        status, after = answers.pop(0)
        headers = {"Retry-After": after} if after else {}
        response: Any = SimpleNamespace(status_code=status, headers=headers, request=None)
        raise RuntimeError("wrapped") from HfHubHTTPError("no", response=response)

    assert upload.retried(call) == "done"
    assert waits == [7, 2, upload.LONGEST]


@pytest.mark.parametrize(
    ("place", "status", "message"),
    [
        ("PUT", 401, "set HF_TOKEN"),
        ("/commit/", 403, "the token may not write there"),
        ("/commit/", 412, "someone else has changed the repository"),
        ("preupload", 418, "the Hub answered 418"),
    ],
)
def test_a_refusal_is_one_line_and_is_not_repeated(
    server: HubServer, finished: Path, place: str, status: int, message: str
) -> None:
    server.faults = [(place, status, {})] * 2
    with pytest.raises(HubError, match=f"^{REPO}: .*{message}") as found:
        upload.push(finished, REPO)
    assert "\n" not in str(found.value)
    assert TOKEN not in str(found.value)
    assert len(server.faults) == 1


def test_a_name_space_that_is_not_ours_is_one_line(server: HubServer, finished: Path) -> None:
    server.faults = [("repos/create", 403, {})]
    with pytest.raises(HubError, match=f"^{REPO}: the token may not write there"):
        upload.push(finished, REPO)


def test_no_way_to_the_hub_is_one_line(server: HubServer, finished: Path) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(HubError, match=rf"^{REPO}: cannot be pushed \(ConnectError: "):
        upload.push(finished, REPO)


def test_what_is_no_name_is_one_line(server: HubServer, finished: Path) -> None:
    with pytest.raises(HubError, match="is no name of a repository; give ORG/NAME"):
        upload.push(finished, "a/b/c")
    assert server.asked == []


def test_a_damaged_directory_is_not_pushed(server: HubServer, finished: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(finished, damaged)
    shard = next(damaged.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(VerifyError, match="its sha256 differs"):
        upload.push(damaged, REPO)
    assert server.asked == []


def test_what_everyone_sees_has_to_be_said(server: HubServer, finished: Path) -> None:
    server.repos[REPO] = {"private": False, "sha": "0" * 40, "files": {}}
    with pytest.raises(HubError, match="say --public"):
        upload.push(finished, REPO)
    assert server.puts() == []
    upload.push(finished, REPO, public=True)
    check_pushed(server, finished)


def test_weights_of_an_earlier_push_do_not_stay(server: HubServer, finished: Path) -> None:
    files = {"model-00001-of-00099.safetensors": b"old", "notes.md": b"kept"}
    server.repos[REPO] = {"private": True, "sha": "0" * 40, "files": files}
    upload.push(finished, REPO)
    assert "model-00001-of-00099.safetensors" not in files
    assert files["notes.md"] == b"kept"


def test_a_card_beside_the_weights_is_the_card(server: HubServer, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "own")
    (tmp_path / "own" / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    upload.push(tmp_path / "own", REPO)
    assert server.repos[REPO]["files"]["README.md"] == b"---\nlicense: mit\n---\nMine.\n"


def test_shards_are_sent_while_the_run_goes_on(
    server: HubServer, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SHARD_BYTES", 40_000)
    server.faults = [("PUT", 418, {})]  # one is refused, which must not stop the run
    recipe = Recipe.from_dict({"method": "rtn", "scheme": {"group_size": 32}})
    out, before, verify = tmp_path / "out", list[str](), upload.verify_checkpoint

    def note_and_verify(directory: Path) -> int:
        before.extend(server.puts())
        return verify(directory)

    monkeypatch.setattr(upload, "verify_checkpoint", note_and_verify)
    upload.quantize_and_push(REPO, make_checkpoint(), out, recipe, Options(), Silent())
    assert len(before) == len(shas(out)), "shards were not sent during the run"
    assert len(server.puts()) == len(before) + 1, "the one that was refused was not sent again, or others were"
    check_pushed(server, out)


def test_a_repository_that_cannot_be_written_is_known_before_the_run(server: HubServer, tmp_path: Path) -> None:
    server.faults = [("repos/create", 403, {})]
    with pytest.raises(HubError, match="the token may not write there"):
        upload.Ahead(Silent(), tmp_path, REPO)


def test_push_to_hub_of_a_loaded_model_writes_the_packed_weights(server: HubServer, finished: Path) -> None:
    AutoModelForCausalLM.from_pretrained(finished).push_to_hub(REPO)
    files = server.repos[REPO]["files"]
    pushed = load(files["model.safetensors"])
    local = {name: tensor for path in finished.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert pushed.keys() == local.keys()
    assert all(torch.equal(pushed[name], local[name]) for name in local)
    block = json.loads((finished / "config.json").read_text())["quantization_config"]
    assert json.loads(files["config.json"])["quantization_config"] == block


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_is_known(finished: Path, tmp_path: Path) -> None:
    card = model_card(finished, REPO, "org/tiny")
    assert front_matter(card) == {
        "base_model": "org/tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmquant", "compressed-tensors", "4-bit", "int4"],
    }
    assert "int4 g32 symmetric by the method `gptq`" in card
    assert "Calibration tokens: " in card
    assert "Not measured." in card
    assert f"vllm serve {REPO}" in card
    own = tmp_path / "measured"
    shutil.copytree(finished, own)
    (own / EVALUATION).write_text(json.dumps({"perplexity": 23.25, "top1": 0.9, "protocol": "wiki.txt, 4 windows"}))
    card = model_card(own, REPO)
    assert "| perplexity | 23.25 |" in card
    assert "wiki.txt, 4 windows" in card
    assert "base_model" not in card
    (own / EVALUATION).write_text('{"protocol": "none"}')
    with pytest.raises(CheckpointError, match="holds no figures"):
        model_card(own, REPO)


def test_origin_and_licence_of_the_original_are_carried_over(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    source = tmp_path / "models--org--tiny" / "snapshots" / commit
    shutil.copytree(make_checkpoint(), source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\nwidget: [1]\n---\n# Tiny\n")
    quantize(source, tmp_path / "out", Recipe.from_dict({"method": "rtn", "scheme": {"group_size": 32}}))
    card = model_card(tmp_path / "out", REPO)
    found = front_matter(card)
    assert (found["license"], found["language"], found["base_model"]) == ("apache-2.0", ["en"], "org/tiny")
    assert "widget" not in found
    assert f"[org/tiny](https://huggingface.co/org/tiny) (commit {commit[:12]}), quantized to int4 g32" in card
