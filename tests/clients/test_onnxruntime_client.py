"""ONNX Runtime computes with our ONNX graphs what we do: logits, the cache, greedy text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agreement import NEW, TIED, compare, installed, prompts
from client_checks import IDS, distance, logits, needs, real
from torch import Tensor
from transformers import AutoTokenizer

from llmquant.convert import convert
from llmquant.runtime.loader import load

pytestmark = needs("onnx", "onnxruntime", target="client-onnxruntime")

ROUNDING = 1e-4  # of the logits: the order of sums in fp32, and exponentials of another library
SUBJECTS = ("the sea", "bread", "a mountain", "winter", "the moon", "chess", "a bicycle", "rain")
PROMPTS = [f"{start} {subject}" for start in ("What is", "Write about", "Who likes", "Why is") for subject in SUBJECTS]


class Client:
    """A session that keeps its cache."""

    def __init__(self, directory: Path) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.reset(1)

    def reset(self, batch: int) -> None:
        self.cache = {
            given.name: np.zeros((batch, given.shape[1], 0, given.shape[3]), np.float32)
            for given in self.session.get_inputs()
            if given.name.startswith("past_key_values")
        }

    def __call__(self, ids: np.ndarray) -> Tensor:
        """The logits of the tokens `ids` [batch, new], after all that were given before."""
        past = next(iter(self.cache.values())).shape[2]
        mask = np.ones((len(ids), past + ids.shape[1]), np.int64)
        found = dict(
            zip(
                self.outputs,
                self.session.run(None, {"input_ids": ids, "attention_mask": mask, **self.cache}),
                strict=True,
            )
        )
        self.cache = {name: found[name.replace("past_key_values", "present")] for name in self.cache}
        return torch.from_numpy(found["logits"])


@pytest.mark.parametrize(
    ("arch", "scheme"),
    [
        ("llama", {"group_size": 32}),
        ("llama", {"group_size": 128, "symmetric": False}),
        ("llama", {"group_size": -1}),
        ("mistral", {"group_size": 64}),
        ("qwen2", {"bits": 8, "group_size": 64, "symmetric": False}),
        ("qwen3", {"bits": 3, "group_size": 32}),
    ],
)
def test_logits(quantized: Callable[..., Path], tmp_path: Path, arch: str, scheme: dict[str, Any]) -> None:
    directory = quantized(arch, scheme=scheme)
    convert(directory, tmp_path / "onnx", "onnx")
    client, expected = Client(tmp_path / "onnx"), logits(real(directory), IDS)
    client.reset(len(IDS))
    assert distance(client(IDS.numpy()), expected) < ROUNDING
    client.reset(1)
    one = IDS[:1]  # ONNX Runtime takes more of a prompt for one sequence at a time
    parts = [client(part.numpy()) for part in one.split([20, 1, 1, 26], dim=1)]  # a prompt, single tokens, more of it
    assert distance(torch.cat(parts, 1), expected[:1]) < ROUNDING


def test_greedy_text_of_a_trained_model(quantized_smollm2: Callable[[str], Path], tmp_path: Path) -> None:
    directory = quantized_smollm2("compressed-tensors")
    convert(directory, tmp_path / "onnx", "onnx")
    client, ours, tokenizer = (
        Client(tmp_path / "onnx"),
        load(directory, torch.float32),
        AutoTokenizer.from_pretrained(directory),
    )
    same = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        own = ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)[0]
        client.reset(1)
        found, new = ids[0].tolist(), ids.numpy()
        while len(found) < len(own):
            found.append(int(client(new)[0, -1].argmax()))
            new = np.array([found[-1:]])
        same += found == own.tolist()
    assert same == len(PROMPTS) == 32


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_agreement(quantized_smollm2: Callable[..., Path], table: Any, tmp_path: Path, symmetric: bool) -> None:
    directory = quantized_smollm2("compressed-tensors", symmetric)
    convert(directory, tmp_path / "onnx", "onnx")
    client, ids = Client(tmp_path / "onnx"), prompts(directory)
    client.reset(len(ids))
    new, chosen, logprobs = ids.numpy(), [], []
    for _ in range(NEW):
        best = client(new)[:, -1].log_softmax(-1).max(-1)
        chosen.append(best.indices)
        logprobs.append(best.values)
        new = best.indices[:, None].numpy()
    found = compare(directory, ids, torch.stack(chosen, 1), torch.stack(logprobs, 1))
    name = f"onnx, {'symmetric' if symmetric else 'asymmetric'}"
    table.add(name, "ONNX Runtime", installed("onnxruntime"), found)
    assert found.margin < TIED
