"""A loaded model on a GPU: what it computes there, and that its checkpoint comes back."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")  # a machine that is there for its GPU may lack it

from llmquant.native import find_gpu_backend
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.generate import generate
from llmquant.runtime.loader import load
from llmquant.scheme import Scheme

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

INPUT = torch.arange(48).reshape(2, 24)


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    quantize(tiny_checkpoint, out, Recipe(method="rtn", scheme=Scheme(4, 32)))
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_those_of_the_cpu(dtype: torch.dtype, packed: Path) -> None:
    with torch.inference_mode():
        expected = load(packed, torch.float32)(INPUT).logits
        found = load(packed, dtype).cuda()(INPUT.cuda()).logits.cpu().float()
    assert (found - expected).norm() / expected.norm() < {torch.float32: 1e-3}.get(dtype, 2e-2)


def test_it_generates(packed: Path) -> None:
    model = load(packed).cuda()
    told = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(INPUT).cuda()}
    first = model.generate(INPUT.cuda(), **told)
    assert first.shape == (2, 32)
    assert torch.equal(model.generate(INPUT.cuda(), **told), first)


def test_the_command_answers(packed: Path) -> None:
    answer = generate(packed, "Hello", max_new_tokens=5, device="cuda")
    assert answer.backend == find_gpu_backend().name
    assert answer.text == generate(packed, "Hello", max_new_tokens=5, device="cuda").text


def test_the_checkpoint_comes_back(packed: Path, tmp_path: Path) -> None:
    before, model = load(packed).state_dict(), load(packed).cuda()
    model.save_pretrained(tmp_path)
    after, back = load(tmp_path).state_dict(), model.cpu().state_dict()
    assert before.keys() == after.keys() == back.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
        assert torch.equal(back[name], tensor), name
