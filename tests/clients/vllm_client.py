"""One checkpoint in vLLM, in a process of its own: `vllm_client.py DIR QUANTIZATION RANKS ASKED.json ANSWER.json`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}


def main(directory: str, quantization: str, ranks: str, asked: str, answer: str) -> None:
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams

    prompts = [{"prompt_token_ids": row} for row in json.loads(Path(asked).read_text())]
    options: dict[str, Any] = {"max_model_len": 512, "enforce_eager": True, "dtype": "bfloat16"}
    llm = LLM(directory, quantization=quantization or None, tensor_parallel_size=int(ranks), **options)
    how = SamplingParams(temperature=0, max_tokens=16, logprobs=0, ignore_eos=True)
    outputs = [output.outputs[0] for output in llm.generate(prompts, how)]
    result: dict[str, Any] = {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
            for output in outputs
        ],
    }
    if ranks == "1":  # the model is in this process
        modules = llm.apply_model(count_calls)[0]
        llm.generate(prompts[:1], how)
        result |= {"modules": modules, "calls": llm.apply_model(lambda model: model.llmquant_calls)[0]}
    Path(answer).write_text(json.dumps(result))


def count_calls(model: Any) -> int:
    """Count from now on how often our packed linears are called; how many there are."""
    found = [module for module in model.modules() if type(module).__name__ == "QuantLinear"]
    model.llmquant_calls = 0

    def called(*_: Any) -> None:
        model.llmquant_calls += 1

    for module in found:
        module.register_forward_hook(called)
    return len(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
