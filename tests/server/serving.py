"""Servers for the tests: real processes, at ports of this machine."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

KEY = "a key"
ADDRESS = re.compile(r" at (http://\S+)/v1, kernel: ")


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    name: str

    def client(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(**{"base_url": self.url, "headers": headers, "timeout": 60} | options)

    def metric(self, name: str) -> float:
        with self.client() as client:
            page = client.get("/metrics").text
        return sum(float(value) for value in re.findall(rf"^llmquant:{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))


@contextmanager
def serving(directory: Path, *options: object) -> Iterator[Server]:
    command = [sys.executable, "-m", "llmquant.cli", "serve", str(directory), "--port", "0", *map(str, options)]
    environment = os.environ | {"LLMQUANT_API_KEY": KEY}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stderr.readline()
        found = ADDRESS.search(line)
        assert found, line + process.stderr.read()
        yield Server(process, found[1], directory.name)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
