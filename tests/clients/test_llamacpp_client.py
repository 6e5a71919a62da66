"""llama.cpp loads our GGUF files as the models that they are made from.

It rounds activations to 8 bits before it multiplies them by 4-bit weights. So plain weights are compared in fp32, where
nothing is rounded; and the file of integers by what 8 bits allow: it may choose otherwise only between tokens that are
all but tied.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from agreement import NEW, compare, installed, prompts
from client_checks import IDS, TEXT, distance, logits, needs, real
from torch import Tensor
from transformers import AutoTokenizer

from llmquant.convert import convert
from llmquant.runtime.loader import load

pytestmark = needs("llama_cpp", "gguf", target="client-llamacpp")

EIGHT_BITS = 0.05  # of the logits: what rounding activations to 8 bits in blocks of 32 leaves
TIED = 0.5  # of a logit


@contextmanager
def open_client(directory: Path) -> Iterator[Any]:
    import llama_cpp

    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def plain() -> Any:
        """Without weights in other orders: those for AMX fail on some virtual machines, whatever the file."""
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_cpp.llama_model_default_params = plain
    try:
        path = str(directory / "model.gguf")
        client = llama_cpp.Llama(path, n_ctx=512, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
    finally:
        llama_cpp.llama_cpp.llama_model_default_params = defaults
    try:
        yield client
    finally:
        client.close()


def client_logits(client: Any, ids: Tensor) -> Tensor:
    """fp32 [sequences, tokens, vocabulary]."""
    rows = []
    for row in ids.tolist():
        client.reset()
        client.eval(row)
        rows.append(np.array(client.scores[: len(row)]))
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_the_model_without_rounding(make_checkpoint: Callable[..., Path], tmp_path: Path, arch: str) -> None:
    """Names, order of rows, norms, rotation: in fp32 the logits are the same but for the order of sums."""
    heads = {"kv_heads": 4} if arch == "olmoe" else {}
    directory = make_checkpoint(arch=arch, hidden=128, intermediate=256, dtype="float32", **heads)
    convert(directory, tmp_path / "gguf", "gguf")
    ids = IDS[:, :30]  # within the window of our small Mistral
    with open_client(tmp_path / "gguf") as client:
        assert distance(client_logits(client, ids), logits(load(directory, torch.float32), ids)) < 1e-3


@pytest.mark.parametrize(
    ("arch", "scheme"),
    [
        ("llama", {"group_size": 32}),
        ("llama", {"group_size": 32, "symmetric": False}),
        ("qwen2", {"group_size": 64}),
        ("qwen3", {"bits": 8, "group_size": 32}),
        ("qwen3_moe", {"group_size": 32}),
    ],
)
def test_integers(quantized: Callable[..., Path], tmp_path: Path, arch: str, scheme: dict[str, Any]) -> None:
    directory = quantized(arch, scheme=scheme)
    convert(directory, tmp_path / "gguf", "gguf")
    bound = 2 * EIGHT_BITS if "moe" in arch else EIGHT_BITS  # some tokens are sent to other experts
    with open_client(tmp_path / "gguf") as client:
        assert distance(client_logits(client, IDS), logits(real(directory), IDS)) < bound


def test_trained_model(quantized_smollm2: Callable[[str], Path], tmp_path: Path) -> None:
    directory = quantized_smollm2("compressed-tensors")
    convert(directory, tmp_path / "gguf", "gguf")
    tokenizer, ours = AutoTokenizer.from_pretrained(directory), load(directory, torch.float32)
    prompt = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        ids = ours.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=200, do_sample=False)
    with open_client(tmp_path / "gguf") as client:
        assert client.tokenize(TEXT.encode(), add_bos=False, special=True) == prompt[0].tolist()
        theirs = client_logits(client, ids)[0]
    own = logits(ours, ids)[0]
    best = own.topk(2).values
    other = theirs.argmax(-1) != own.argmax(-1)
    assert float(other.float().mean()) < 0.05
    assert float((best[:, 0] - best[:, 1])[other].max() if other.any() else 0) < TIED


def test_next_tokens(quantized_smollm2: Callable[..., Path], tmp_path: Path) -> None:
    """1,000 places in four texts. Built with a BLAS, llama.cpp multiplies so many tokens in fp32."""
    import llama_cpp

    directory = quantized_smollm2("compressed-tensors", True, 32)
    convert(directory, tmp_path / "gguf", "gguf")
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = AutoTokenizer.from_pretrained(directory)(text[:20_000], return_tensors="pt")["input_ids"]
    ids = tokens[0, :1000].view(4, 250)
    with open_client(tmp_path / "gguf") as client:
        theirs = client_logits(client, ids)
    same = int((theirs.argmax(-1) == logits(load(directory, torch.float32), ids).argmax(-1)).sum())
    blas = any((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-blas*"))
    print(f"llama.cpp {'with' if blas else 'without'} a BLAS: the same next token at {same} of 1000 places")
    assert same >= (990 if blas else 940)


@pytest.mark.parametrize("symmetric", [True, False], ids=["Q4_0", "Q4_1"])
def test_agreement(quantized_smollm2: Callable[..., Path], table: Any, tmp_path: Path, symmetric: bool) -> None:
    directory = quantized_smollm2("compressed-tensors", symmetric)
    convert(directory, tmp_path / "gguf", "gguf")
    ids, chosen, logprobs = prompts(directory), [], []
    with open_client(tmp_path / "gguf") as client:
        for row in ids.tolist():
            client.reset()
            client.eval(row)
            for _ in range(NEW):
                scores = torch.from_numpy(client.scores[client.n_tokens - 1]).log_softmax(-1)
                logprobs.append(scores.max())
                chosen.append(int(scores.argmax()))
                client.eval(chosen[-1:])
    shape = len(ids), NEW
    found = compare(directory, ids, torch.tensor(chosen).view(shape), torch.stack(logprobs).view(shape))
    table.add(f"gguf {'Q4_0' if symmetric else 'Q4_1'}", "llama.cpp", installed("llama-cpp-python"), found)
    assert found.margin < 2 * TIED
