"""Nothing outside the model is opened, no foreign code is invited, and the Hub's refusals are one line each."""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import CheckpointError

INDEX = "model.safetensors.index.json"

HOSTILE_NAMES = [
    "../secret.safetensors",
    "../../etc/x.safetensors",
    "/etc/x.safetensors",
    "//host/share/x.safetensors",
    "a/b.safetensors",
    "./model.safetensors",
    "..\\secret.safetensors",
    "C:\\x.safetensors",
    "C:x.safetensors",
    "\\\\host\\share\\x.safetensors",
    "file:x.safetensors",
    "x.safetensors/../../secret.safetensors",
    "~/../x.safetensors",
    "\0.safetensors",
    "a\n.safetensors",
    "\u202e.safetensors",
    "x" * 300 + ".safetensors",
]

WATCHED = """
import sys
opened = []
def watch(event, args):
    if event == "open":
        opened.append(str(args[0]))
from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import CheckpointError
sys.addaudithook(watch)
for root in sys.argv[2:]:
    try:
        Checkpoint.open(root)
        print("opened", root)
    except CheckpointError:
        pass
print(*(path for path in opened if sys.argv[1] in path), sep="\\n")
"""


def with_index(root: Path, name: str) -> None:
    (root / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_index_cannot_name_a_file_elsewhere(name: str, single: Path) -> None:
    with_index(single, name)
    with pytest.raises(CheckpointError, match="is not a plain file name; do not use this checkpoint") as caught:
        Checkpoint.open(single)
    assert str(caught.value).isprintable()


def link_out(root: Path, outside: Path) -> None:
    (root / "model.safetensors").rename(outside)
    (root / "model.safetensors").symlink_to(outside)


def link_out_by_two_steps(root: Path, outside: Path) -> None:
    (root / "model.safetensors").rename(outside)
    (root / "step").symlink_to(outside)
    (root / "model.safetensors").symlink_to("step")


def link_out_by_a_folder(root: Path, outside: Path) -> None:
    (root / "model.safetensors").rename(outside)
    (root / "folder").symlink_to(outside.parent)
    (root / "model.safetensors").symlink_to(f"folder/{outside.name}")


def link_config_out(root: Path, outside: Path) -> None:
    (root / "config.json").rename(outside)
    (root / "config.json").symlink_to(outside)


def link_tokenizer_out(root: Path, outside: Path) -> None:
    outside.write_text("a private key")
    (root / "tokenizer.model").symlink_to(outside)


LINKS = [link_out, link_out_by_two_steps, link_out_by_a_folder, link_config_out, link_tokenizer_out]


@pytest.mark.parametrize("attack", LINKS)
def test_link_out_of_the_model_is_refused(attack: Callable[[Path, Path], None], single: Path, tmp_path: Path) -> None:
    attack(single, tmp_path / "outside")
    with pytest.raises(CheckpointError, match=f"is a link to {tmp_path}/outside, outside the model; copy the file"):
        Checkpoint.open(single)


def test_nothing_outside_is_opened(single: Path, tmp_path: Path, run_child: Any) -> None:
    """The whole corpus in one process that records every open(2) of Python."""
    roots = []
    for number, name in enumerate(HOSTILE_NAMES):
        roots.append(tmp_path / f"name{number}")
        os.makedirs(roots[-1])
        (roots[-1] / "config.json").write_bytes((single / "config.json").read_bytes())
        with_index(roots[-1], name)
    (tmp_path / "secret.safetensors").write_bytes((single / "model.safetensors").read_bytes())
    child = run_child(WATCHED, tmp_path, *roots)
    assert child.returncode == 0, child.stderr
    opened = child.stdout.split("\n")[:-1]
    assert opened  # the config of each was
    assert {path for path in opened if not path.endswith(("/config.json", f"/{INDEX}"))} == set()


def test_link_inside_the_model_is_followed(single: Path) -> None:
    (single / "model.safetensors").rename(single / "data")
    (single / "model.safetensors").symlink_to("data")
    assert Checkpoint.open(single).tensors


@pytest.mark.parametrize("kind", ["loop", "fifo", "directory", "device", "dangling"])
def test_shard_that_is_no_file(kind: str, single: Path) -> None:
    path = single / "model.safetensors"
    path.unlink()
    words = "is not a regular file"
    if kind == "loop":
        path.symlink_to(path)
        words = "Too many levels of symbolic links"
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
        words = "is a link to /dev/zero, outside the model"
    else:
        path.symlink_to("gone")
        words = "No such file"
    with pytest.raises(CheckpointError, match=f"{path}: {words}"):
        Checkpoint.open(single)


CONFIGS = {
    "no_model_type": ({}, "model_type: is missing"),
    "model_type_is_a_number": ({"model_type": 1}, "model_type: is missing"),
    "auto_map": ({"auto_map": {"AutoModel": "x.X"}}, "'auto_map': the model needs its own code"),
    "auto_map_nested": ({"text_config": {"auto_map": {}}}, "'text_config.auto_map': the model needs its own code"),
    "auto_map_in_a_list": ({"experts": [{"auto_map": {}}]}, "'experts.auto_map': the model needs its own code"),
    "internal_attention": ({"_attn_implementation_internal": "x/y"}, "'_attn_implementation_internal': can make"),
    "internal_experts": ({"_experts_implementation_internal": "a"}, "'_experts_implementation_internal': can make"),
    "internal_nested": ({"vision_config": {"_attn_implementation_internal": "a"}}, "can make a loader run foreign"),
    "kernel_of_the_hub": ({"attn_implementation": "evil/kernel"}, "'attn_implementation': can make a loader run"),
    "kernel_private": ({"_attn_implementation": "evil/kernel@v1:f"}, "'_attn_implementation': can make a loader"),
    "kernel_by_part": ({"attn_implementation": {"text": "evil/kernel"}}, "'attn_implementation.text': can make"),
    "trust_nested": ({"text_config": {"trust_remote_code": True}}, "'text_config.trust_remote_code': can make"),
    "dunder": ({"__class__": "x"}, "'__class__': can make a loader run foreign code"),
    "dunder_number": ({"limit": {"__float__": "os.system"}}, "'limit.__float__': can make a loader run foreign code"),
    "nested_deep": (json.loads('{"a":' * 50 + "1" + "}" * 50), "is nested too deep"),
    "newline_in_a_key": ({"a\nb_internal": 1}, r"'a\\nb_internal': can make"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_would_run_code_is_refused(case: str, single: Path) -> None:
    config, words = CONFIGS[case]
    model_type = {} if "model_type" in case else {"model_type": "llama"}
    (single / "config.json").write_text(json.dumps(model_type | config))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(single)
    assert words.replace("\\\\", "\\") in str(caught.value)
    assert str(caught.value).startswith(f"{single}/config.json: ")
    assert str(caught.value).isprintable()


def test_config_as_transformers_writes_it_is_fine(single: Path) -> None:
    config = {"model_type": "llama", "_name_or_path": "a/b", "_attn_implementation_autoset": True, "auto_map": {}}
    (single / "config.json").write_text(json.dumps(config | {"attn_implementation": "sdpa"}))
    assert Checkpoint.open(single, trust_remote_code=True).config["_name_or_path"] == "a/b"


@pytest.mark.parametrize("raw", ['{"model_type": "a", "model_type": "b"}', '{"a": NaN}', '{"a": -Infinity}', "[]", "7"])
def test_config_that_two_parsers_read_differently(raw: str, single: Path) -> None:
    (single / "config.json").write_text(raw)
    with pytest.raises(CheckpointError, match=r"config\.json: (not valid JSON|holds a JSON)"):
        Checkpoint.open(single)


@pytest.mark.parametrize("model", ["/no/such/place", "a/b/c", "no such", "", ".hidden/../x", "http://x/y"])
def test_neither_a_directory_nor_a_name(model: str) -> None:
    with pytest.raises(CheckpointError, match="is not a directory; give a model directory or a name on the Hub"):
        Checkpoint.open(model) if model else Checkpoint.open("\0")


def test_file_in_place_of_the_directory(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a directory"):
        Checkpoint.open(single / "model.safetensors")
    monkeypatch.chdir(single)
    with pytest.raises(CheckpointError, match=r"config\.json: is not a directory"):
        Checkpoint.open("config.json")


def test_revision_of_a_directory(single: Path) -> None:
    with pytest.raises(CheckpointError, match="revision: is for names on the Hub"):
        Checkpoint.open(single, revision="main")


@pytest.mark.parametrize("revision", [None, "main", "abc123"])
def test_remote_code_of_a_moving_branch(revision: str | None) -> None:
    with pytest.raises(CheckpointError, match="pin revision to a full commit"):
        Checkpoint.open("owner/name", revision=revision, trust_remote_code=True)


# ---- the Hub's cache: a snapshot is a folder of links

COMMIT = "0123456789" * 4


@pytest.fixture
def cache(single: Path, tmp_path: Path) -> Path:
    """A cache that holds owner/name at COMMIT, laid out as huggingface_hub does."""
    repo = tmp_path / "hub" / "models--owner--name"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(single.iterdir())):
        file.rename(repo / "blobs" / str(number))
        (repo / "snapshots" / COMMIT / file.name).symlink_to(f"../../blobs/{number}")
    shared = tmp_path / "hub" / "blobs" / "ab"  # where large files of several models are kept once
    shared.mkdir(parents=True)
    blob = (repo / "snapshots" / COMMIT / "model.safetensors").resolve()
    blob.rename(shared / "abcd")
    blob.symlink_to("../../blobs/ab/abcd")
    return tmp_path / "hub"


OPEN_BY_NAME = """
import sys
from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import CheckpointError
for name in sys.argv[1:]:
    try:
        checkpoint = Checkpoint.open(name)
        print(checkpoint.commit, len(checkpoint.tensors), checkpoint.side_files())
    except CheckpointError as error:
        print(error)
"""


def hub(tmp_path: Path, **extra: str) -> dict[str, str]:
    return {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", **extra}


def test_cached_model_opens_offline_by_name(cache: Path, tmp_path: Path, run_child: Any) -> None:
    child = run_child(OPEN_BY_NAME, "owner/name", env=hub(tmp_path, HF_HUB_OFFLINE="1"))
    assert child.stdout == f"{COMMIT} 4 ['tokenizer.json']\n", child.stderr


def test_snapshot_opens_as_a_directory(cache: Path) -> None:
    snapshot = cache / "models--owner--name" / "snapshots" / COMMIT
    assert len(Checkpoint.open(snapshot).tensors) == 4


def test_snapshot_cannot_link_beyond_its_cache(cache: Path, tmp_path: Path) -> None:
    snapshot = cache / "models--owner--name" / "snapshots" / COMMIT
    (tmp_path / "secret").write_text("{}")
    (snapshot / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"is a link to .*secret, outside the model"):
        Checkpoint.open(snapshot)


class Refusing(BaseHTTPRequestHandler):
    """A Hub that answers with the status and error code that the model's name asks for: `404-RepoNotFound`."""

    def do_GET(self) -> None:
        asked = re.search(r"/(\d{3})-(\w+)", self.path)
        self.send_response(int(asked[1]) if asked else 404)
        self.send_header("X-Error-Code", asked[2] if asked else "")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


REFUSALS = {
    "owner/404-RepoNotFound": "neither a directory here nor a model the Hub shows us; check the name",
    "owner/401-RepoNotFound": "neither a directory here nor a model the Hub shows us; check the name",
    "owner/403-GatedRepo": "the model is gated; accept its terms on its page and set HF_TOKEN",
    "owner/404-RevisionNotFound": "has no revision 'main' on the Hub",
    "owner/500-Broken": "cannot be fetched from the Hub (LocalEntryNotFoundError: ",
    "owner/bad..name": "cannot be fetched from the Hub (HFValidationError: ",
}


def test_refusal_of_the_hub_is_one_line(endpoint: str, tmp_path: Path, run_child: Any) -> None:
    child = run_child(OPEN_BY_NAME, *REFUSALS, env=hub(tmp_path, HF_ENDPOINT=endpoint))
    lines = child.stdout.splitlines()
    assert len(lines) == len(REFUSALS), child
    for (name, words), line in zip(REFUSALS.items(), lines, strict=True):
        assert line.startswith(f"{name}: {words}")


def test_unreachable_hub_is_one_line(tmp_path: Path, run_child: Any) -> None:
    child = run_child(OPEN_BY_NAME, "owner/name", env=hub(tmp_path, HF_ENDPOINT="http://127.0.0.1:9"))
    assert child.stdout.startswith("owner/name: cannot be fetched from the Hub ("), child
    assert child.stdout.endswith("); check the network and the name, or give a local directory\n")
