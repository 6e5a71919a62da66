"""transformers after `import llmquant`: the same checkpoints, by our kernels."""

import subprocess
import sys

import pytest
from agreement import TIED, compare, installed, prompts
from safetensors.torch import load_file, save_file

# In a process of its own, as users run it: the tests beside this one are without our hook.
SCRIPT = """
import sys, torch, llmquant
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
directory, ids, out = sys.argv[1:]
model, ids = AutoModelForCausalLM.from_pretrained(directory), load_file(ids)["ids"]
model.generation_config.eos_token_id = None
rows = []
for row in ids.split(1):
    asked = {"attention_mask": torch.ones_like(row), "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    rows.append(model.generate(row, **asked))
save_file({"ids": torch.cat(rows)}, out)
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


@pytest.mark.parametrize(
    ("layout", "symmetric"),
    [("compressed-tensors", True), ("compressed-tensors", False), ("gptq", True), ("awq", False)],
)
def test_agreement(quantized_smollm2, table, tmp_path, layout: str, symmetric: bool) -> None:
    directory = quantized_smollm2(layout, symmetric)
    ids = prompts(directory)
    asked, answer = tmp_path / "asked.safetensors", tmp_path / "answer.safetensors"
    save_file({"ids": ids}, asked)
    command = [sys.executable, "-c", SCRIPT, str(directory), str(asked), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "QuantLinear\n", done.stderr
    found = compare(directory, ids, load_file(answer)["ids"][:, ids.shape[1] :])
    name = f"{layout}, {'symmetric' if symmetric else 'asymmetric'}"
    table.add(name, "transformers, `import llmquant`", installed("transformers"), found)
    assert found.margin < TIED
