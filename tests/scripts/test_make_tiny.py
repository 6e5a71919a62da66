"""Synthetic checkpoints: the same bytes from the same options, and loadable for every family."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt_neox")


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_loads_and_predicts(make_checkpoint, arch):
    directory = make_checkpoint(arch=arch)
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    text = "Bytes: é 日本\n"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        logits = model(ids).logits.float()
    assert 0.3 < float(logits.std()) < 3  # neither flat nor saturated


def test_same_options_give_the_same_bytes(make_checkpoint, tmp_path):
    first = make_checkpoint(seed=5)
    make_tiny = sys.modules["make_tiny"]
    make_tiny.make_tiny(tmp_path, make_tiny.Spec(seed=5))
    assert files(tmp_path) == files(first)
    assert files(tmp_path)["model.safetensors"] != files(make_checkpoint(seed=6))["model.safetensors"]


def test_shards_and_tied_embeddings(make_checkpoint):
    directory = make_checkpoint(layers=4, hidden=256, intermediate=512, tied=1, shard_mb=1)
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
