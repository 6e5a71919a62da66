"""Text from a packed checkpoint: the shortest way from a prompt to an answer."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmquant.errors import CheckpointError
from llmquant.model.tokenizer import chat_text, load_tokenizer
from llmquant.native import active_backend
from llmquant.runtime.loader import load


@dataclass(frozen=True)
class Answer:
    """Generated text and how long it took."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    backend: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def stats(self) -> str:
        rate = self.new_tokens / self.seconds
        return f"{self.new_tokens} tokens in {self.seconds:.2f} s ({rate:.1f} tokens/s), kernel: {self.backend}"


def generate(
    directory: Path, prompt: str, *, max_new_tokens: int = 128, precision: str = "exact", device: str = "cpu"
) -> Answer:
    """Continue `prompt` greedily on a device of torch; through the chat template where the tokenizer has one.

    Raises:
        CheckpointError: the directory cannot be loaded, or has no tokenizer.
    """
    # generate() is a mixin that the base class does not declare
    model: Any = load(directory, precision=precision, device=device)
    tokenizer = load_tokenizer(directory)
    if tokenizer.chat_template:
        prompt = chat_text(tokenizer, [{"role": "user", "content": prompt}])
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    length = int(inputs["input_ids"].shape[1])
    if length == 0:
        raise CheckpointError("--prompt: is empty; give some text to continue")
    started = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    seconds = time.perf_counter() - started
    new = ids[0, length:]
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    return Answer(text, length, len(new), seconds, active_backend(torch.device(device).type))
