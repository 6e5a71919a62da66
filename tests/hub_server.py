"""A Hub on this machine that speaks what a push needs: repositories, LFS by sha256, commits. Faults on demand."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer(ThreadingHTTPServer):
    """Repositories, the stored files, and everything that was asked, in order.

    Attributes:
        repos: name -> {"private", "sha", "files": path -> content}.
        objects: sha256 -> content, as LFS keeps it whether or not a commit names it.
        asked: "METHOD path" of each request.
        faults: (pattern of "METHOD path", status, headers); each answers one request that it matches.
        hold: if set, a PUT whose number it is waits forever: the moment to kill the client.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.faults: list[tuple[str, int, dict[str, str]]] = []
        self.hold: int | None = None
        self.held = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def puts(self) -> list[str]:
        """The sha256 of each file that was sent."""
        return [request.rpartition("/")[2] for request in self.asked if request.startswith("PUT ")]


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.handle_request()

    do_POST = do_PUT = do_GET

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {self.path.partition('?')[0]}"
        self.server.asked.append(asked)
        self.server.tokens.add(self.headers.get("Authorization"))
        for fault in self.server.faults:
            if re.search(fault[0], asked):
                self.server.faults.remove(fault)
                return self.answer(fault[1], {"error": "as asked"}, fault[2])
        if self.command == "PUT" and len(self.server.puts()) == self.server.hold:
            self.server.held.set()
            threading.Event().wait()
        for pattern, act in ROUTES.items():
            if found := re.fullmatch(pattern, asked):
                return act(self, body, *found.groups())
        return self.answer(404, {"error": asked})

    def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {
            "Content-Length": str(len(raw)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(raw)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repos:
            return self.answer(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
        private = asked.get("private", asked.get("visibility") == "private")
        self.server.repos[name] = {"private": private, "sha": "0" * 40, "files": {}}
        return self.answer(200, {"url": f"{self.server.url}/{name}", "name": name})

    def info(self, _: bytes, name: str) -> None:
        if (repo := self.server.repos.get(name)) is None:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": file} for file in repo["files"]]
        return self.answer(200, {"id": name, "private": repo["private"], "sha": repo["sha"], "siblings": siblings})

    def preupload(self, body: bytes, name: str) -> None:
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
            | {"shouldIgnore": False, "oid": None}
            for f in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            send = {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}
            objects.append(entry if entry["oid"] in self.server.objects else entry | {"actions": send})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.answer(200, {})

    def commit(self, body: bytes, name: str) -> None:
        repo = self.server.repos[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, repo["sha"]):
                return self.answer(412, {"error": "the branch has moved"})
            if line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo["files"][value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del repo["files"][value["path"]]
        repo["sha"] = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        return self.answer(
            200,
            {"success": True, "commitOid": repo["sha"], "commitUrl": f"{self.server.url}/{name}/commit/{repo['sha']}"},
        )

    def yaml(self, _: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    "POST /api/repos/create": Handler.create,
    f"GET /api/models/{NAME}(?:/revision/main)?": Handler.info,
    f"POST /api/models/{NAME}/preupload/main": Handler.preupload,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": Handler.batch,
    "PUT /lfs/([0-9a-f]{64})": Handler.put,
    f"POST /api/models/{NAME}/commit/main": Handler.commit,
    "POST /api/validate-yaml": Handler.yaml,
}
