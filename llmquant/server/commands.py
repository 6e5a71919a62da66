"""`llmquant serve`."""

import asyncio
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Sequence
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.display import console
from llmquant.errors import ServerError
from llmquant.options import Device, Precision, PrecisionName, parse_size, resolve_device

if TYPE_CHECKING:
    from llmquant.server.app import Service

KEY = "LLMQUANT_API_KEY"
DRAIN = 30  # seconds that running answers have when the server is asked to end
HEADERS = 64 << 10  # bytes


class EngineName(str, Enum):
    transformers = "transformers"
    vllm = "vllm"


def serve(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="-- OPTION...", help="With --engine vllm: what else vLLM is told.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(help=f"Ask for it; may be given several times, or as {KEY}.")
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="vllm: our kernels inside of vLLM.")] = EngineName.transformers,
    served_model_name: Annotated[str | None, typer.Option(help="(default: the directory's)")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Of prompt and answer. (default: the model's)")
    ] = None,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Requests that are computed at a time.")] = 16,
    cache_memory: Annotated[
        str | None, typer.Option(help="For all requests, as in 4GB. (default: 80 % of what the model leaves)")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that wait; more are told to come back.")] = 64,
    precision: Precision = PrecisionName.exact,
    device: Device = "auto",
) -> None:
    """Answer HTTP requests as OpenAI's interface spells them: /v1/chat/completions and /v1/completions."""
    given = os.environ.get(KEY)
    keys = api_key or ([given] if given else [])
    if not keys and not _is_loopback(host):
        raise typer.BadParameter(f"--host {host}: others can reach it; give an --api-key, or set {KEY}")
    if not all(key.strip() for key in keys):
        raise typer.BadParameter("--api-key: is empty")
    if more and engine is not EngineName.vllm:
        raise typer.BadParameter(f"{more[0]}: options after -- are vLLM's; they go with --engine vllm")
    name = served_model_name or directory.resolve().name
    cache = parse_size(cache_memory, "--cache-memory")
    if engine is EngineName.vllm:
        if cache is not None:
            raise typer.BadParameter("--cache-memory: vLLM has --kv-cache-memory-bytes for that; give it after --")
        told = {"--host": host, "--port": port, "--served-model-name": name, "--max-num-seqs": max_concurrency}
        told |= {"--max-model-len": max_model_len} if max_model_len else {}
        exec_vllm(directory, [*(str(part) for pair in told.items() for part in pair), *(more or ())], keys)
    missing = [package for package in ("fastapi", "uvicorn", "prometheus_client") if not find_spec(package)]
    if missing:
        raise ServerError(f"serve needs {' and '.join(missing)}; pip install 'llmquant[serve]'")
    with _bound(host, port) as listening:
        service = make_service(
            directory,
            name,
            room=max_model_len,
            cache=cache,
            at_once=max_concurrency,
            queue=max_queue,
            precision=precision.value,
            device=resolve_device(device),
        )
        run(service, keys, listening)


def exec_vllm(directory: Path, options: Sequence[str], keys: Sequence[str]) -> None:
    """Become vLLM's server, with our kernels."""
    from llmquant.checkpoint.reader import Checkpoint

    Checkpoint.open(directory)
    if not find_spec("vllm"):
        raise ServerError("--engine vllm needs vLLM in this environment; pip install vllm")
    if len(keys) > 1:
        raise typer.BadParameter("--api-key: one of them, with --engine vllm")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--quantization", "llmquant", *options]
    # A key in the environment is seen by fewer people than one in the list of processes.
    os.execve(sys.executable, command, os.environ | ({"VLLM_API_KEY": keys[0]} if keys else {}))  # noqa: S606


def make_service(
    directory: Path,
    name: str,
    *,
    room: int | None,
    cache: int | None,
    at_once: int,
    queue: int,
    precision: str,
    device: str,
) -> "Service":
    """Load the checkpoint and start its engine.

    `room` is what a prompt and its answer have together, in tokens; by default what the model is made for, or what
    `cache` bytes, or else the memory that is left, have room for.

    Raises:
        CheckpointError: the directory cannot be loaded, or has no tokenizer.
        ServerError: its tokenizer cannot be used, or the model is not made for so many tokens, or memory is too small.
    """
    from llmquant.checkpoint.reader import Checkpoint
    from llmquant.model.tokenizer import load_tokenizer
    from llmquant.runtime.loader import load
    from llmquant.server.app import Service
    from llmquant.server.engine import Engine
    from llmquant.server.metrics import Metrics
    from llmquant.server.prompt import Prompts
    from llmquant.server.room import room_for

    Checkpoint.open(directory)  # what is none is told by its name, not by its tokenizer
    tokenizer = load_tokenizer(directory)
    if not tokenizer.is_fast:
        raise ServerError(f"{directory}: serve needs a tokenizer.json; save the tokenizer with a current transformers")
    model: Any = load(directory, precision=precision, device=device)
    most = getattr(model.config, "max_position_embeddings", None)
    if room and most and room > most:
        raise ServerError(f"--max-model-len {room}: the model has {most} positions")
    wanted: int | None = room or most
    if not wanted:
        raise ServerError(f"{directory}: config.json does not say how many positions there are; give --max-model-len")
    caches = room_for(model, cache)
    if caches < (room or 2):
        told = "raise --cache-memory, or lower --max-model-len"
        raise ServerError(f"{directory}: caches have memory for {caches} tokens, not for {room or 2}; {told}")
    if caches < wanted:
        console.print(f"caches have memory for {caches} tokens, of the {wanted} that the model is made for")
    room = min(wanted, caches)
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    engine = Engine(model, tokenizer.backend_tokenizer, ends, at_once=at_once, queue=queue, room=caches)
    prompts = Prompts(tokenizer, room, model.config.vocab_size)
    return Service(name, engine, prompts, model.generation_config, Metrics(engine))


def run(service: "Service", keys: Sequence[str], listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, and then until running answers have ended, or `DRAIN` seconds."""
    import uvicorn

    from llmquant.native import active_backend
    from llmquant.server.app import make_app
    from llmquant.server.connection import Connection
    from llmquant.server.guard import Guard

    config = uvicorn.Config(
        Guard(make_app(service), keys),
        log_level="warning",
        http=Connection,
        h11_max_incomplete_event_size=HEADERS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=DRAIN,
        server_header=False,
    )
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: None)  # uvicorn has its own meanwhile, and raises them again when it has ended
    host, port = listening.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    kernel = active_backend(service.engine.device)
    console.print(f"{service.name} at http://{where}:{port}/v1, kernel: {kernel}", soft_wrap=True)
    asyncio.run(uvicorn.Server(config).serve([listening]))
    service.engine.close()


def _bound(host: str, port: int) -> socket.socket:
    """Not listening yet: who comes while the model is loaded is refused."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ServerError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from error
    return bound


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
