"""The same server on a GPU; `scripts/gpu_check.sh --only serve` runs it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")

from llmquant.runtime.generate import generate

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


def test_it_answers_on_a_gpu_as_generate_does(packed: Path, start: Callable[..., Any]) -> None:
    expected = generate(packed, "Hello", max_new_tokens=5, device="cuda")
    with start(packed, "--device", "cuda") as server, server.client() as client, ThreadPoolExecutor(6) as pool:

        def ask(text: str, most: int = 40) -> str:
            chat = {"model": server.name, "messages": [{"role": "user", "content": text}], "temperature": 0}
            answer = client.post("/v1/chat/completions", json=chat | {"max_tokens": most})
            return answer.json()["choices"][0]["message"]["content"]

        # A character that is cut off is left out, which generate tells as U+FFFD.
        assert ask("Hello", 5) == expected.text.rstrip("\ufffd")
        texts = [f"Count to {n}" for n in range(6)]
        assert list(pool.map(ask, texts)) == [ask(text) for text in texts]
