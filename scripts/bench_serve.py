#!/usr/bin/env python3
"""What a server gives to one user and to many: tokens per second, time to the first token and between tokens.

Starts `llmquant serve DIR`, and asks it, and every other server that speaks OpenAI's interface, in turn, for as many
completions at a time as there are users, each of another prompt. Client and server share the machine.

    python scripts/bench_serve.py serve.json DIR --users 1,4,16 --peer llama.cpp=http://localhost:8080
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

from llmquant.bench.kernels import machine
from llmquant.checkpoint.reader import Checkpoint

KEY = "bench"
ADDRESS = re.compile(r" at (http://\S+)/v1, kernel: ")
ROUNDS = 3


class Server(NamedTuple):
    url: str
    model: str


class Answer(NamedTuple):
    """Of one completion: when its pieces came, in seconds after it was asked for, and how many tokens it has."""

    times: list[float]
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a JSON file")
    parser.add_argument("directory", type=Path, help="a packed checkpoint")
    parser.add_argument("--users", type=_counts, default=[1, 2, 4, 8, 16], help="requests at a time, as in 1,4,16")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL", help="another server that runs")
    options = parser.parse_args()
    peers = dict(peer.split("=", 1) for peer in options.peer if "=" in peer)
    if len(peers) != len(options.peer):
        parser.error("--peer: give NAME=URL, each name once")
    if not options.out.parent.is_dir():
        parser.error(f"{options.out}: there is no directory {options.out.parent}; make it")
    with serving(options.directory, max(options.users)) as url:
        servers = {name: Server(at, model_of(at)) for name, at in ({"llmquant": url} | peers).items()}
        vocabulary = int(Checkpoint.open(options.directory).config["vocab_size"])
        shape = max(options.users), options.prompt_tokens
        prompts = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0)).tolist()
        results = list(measure(servers, options.users, prompts, options.new_tokens))
    for row in results:
        line = "{server:12} {users:3d} users {tokens_per_second:7.1f} tokens/s, first after {first_seconds:.3f} s, "
        sys.stderr.write((line + "then each {next_seconds:.4f} s\n").format(**row))
    facts = {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens, "results": results}
    options.out.write_text(json.dumps(machine() | facts, indent=2) + "\n")


@contextmanager
def serving(directory: Path, users: int) -> Iterator[str]:
    """Our server's address."""
    command = [sys.executable, "-m", "llmquant.cli", "serve", str(directory), "--port", "0"]
    command += ["--max-concurrency", str(users), "--max-queue", str(users)]
    told = os.environ | {"LLMQUANT_API_KEY": KEY}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=told)
    try:
        assert process.stderr is not None  # noqa: S101
        said = ""
        while not (found := ADDRESS.search(said)):
            line = process.stderr.readline()
            if not line:
                raise SystemExit(f"error: the server ended: {said.strip()}")
            said += line
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def model_of(url: str) -> str:
    try:
        found = httpx.get(f"{url}/v1/models", headers=_headers()).raise_for_status().json()
    except httpx.HTTPError as error:
        raise SystemExit(f"error: {url}: no server answers there: {error}") from error
    return str(found["data"][0]["id"])


def measure(
    servers: dict[str, Server], users: Sequence[int], prompts: list[list[int]], new: int
) -> Iterator[dict[str, Any]]:
    """Medians over rounds, in each of which every server has its turn."""
    rows: dict[tuple[str, int], list[tuple[float, float, float]]] = {(s, n): [] for n in users for s in servers}
    for round_ in range(-1, ROUNDS):  # the first one wakes them
        for (name, count), taken in rows.items():
            started = time.perf_counter()
            answers = asyncio.run(_ask_all(servers[name], prompts[:count], new))
            seconds = time.perf_counter() - started
            if round_ >= 0:
                gaps = [b - a for answer in answers for a, b in zip(answer.times, answer.times[1:], strict=False)]
                first = statistics.median(answer.times[0] for answer in answers)
                total = sum(answer.tokens for answer in answers)
                taken.append((total / seconds, first, statistics.median(gaps) if gaps else 0.0))
    for (name, count), taken in rows.items():
        rate, first, after = map(statistics.median, zip(*taken, strict=True))
        yield {
            "server": name,
            "users": count,
            "tokens_per_second": rate,
            "first_seconds": first,
            "next_seconds": after,
        }


async def _ask_all(server: Server, prompts: list[list[int]], new: int) -> list[Answer]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, headers=_headers(), timeout=600, limits=limits) as client:
        return await asyncio.gather(*(_ask(client, server.model, prompt, new) for prompt in prompts))


async def _ask(client: httpx.AsyncClient, model: str, prompt: list[int], new: int) -> Answer:
    body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
    started, times, tokens = time.perf_counter(), list[float](), 0
    told = body | {"stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=told) as response:
        if response.status_code != 200:
            raise SystemExit(f"error: {client.base_url}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                if event["choices"]:
                    times.append(time.perf_counter() - started)
    return Answer(times, tokens)


def _headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"}


def _counts(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers from 1 on, as in 1,4,16")
    return sorted({int(part) for part in text.split(",")})


if __name__ == "__main__":
    main()
