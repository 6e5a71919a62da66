"""Layer by layer gives what the whole model gives, in every family, padding or not."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from llmquant.calibration.batches import Batch
from llmquant.calibration.stream import Stream
from llmquant.checkpoint.reader import Checkpoint
from llmquant.model.layout import derive_layout
from llmquant.model.shell import Shell
from llmquant.solve.hessian import Hessian

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = [
    LlamaConfig(**GATED),
    MistralConfig(sliding_window=8, **GATED),
    Qwen2Config(**GATED),
    Qwen3Config(head_dim=8, **GATED),
    Gemma2Config(head_dim=8, sliding_window=8, **GATED),
    Gemma3TextConfig(head_dim=8, sliding_window=8, **GATED),
    Phi3Config(pad_token_id=0, eos_token_id=1, **GATED),
    OPTConfig(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, **SIZES),
    GPTNeoXConfig(intermediate_size=48, **SIZES),
]


def build(config: PretrainedConfig, directory: Path) -> Shell:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return Shell(Checkpoint.open(directory))


def batch(length: int, rows: int = 2, seed: int = 0, padded: int = 0) -> Batch:
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(rows, length, dtype=torch.bool)
    if padded:
        ids[-1, -padded:], mask[-1, -padded:] = 0, False
    return Batch(ids, mask)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.model_type)
def test_layer_by_layer_equals_the_whole_model(config: PretrainedConfig, tmp_path: Path) -> None:
    shell = build(config, tmp_path)
    layers = derive_layout(shell.config).layers
    batches = (batch(20), batch(13, rows=1, seed=1))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    inputs: dict[str, list[torch.Tensor]] = {}
    for layer in layers:
        for group in layer.groups:
            seen = inputs.setdefault(group.linears[0], [])
            hook = lambda module, args, seen=seen: seen.append(args[0])  # noqa: E731
            whole.get_submodule(group.linears[0]).register_forward_pre_hook(hook)
    with torch.no_grad():
        for b in batches:
            whole(input_ids=b.input_ids)

    stream = Stream(shell, layers, batches)
    for layer in layers:
        with shell.filled(shell.part(layer.name)):
            for group in layer.groups:
                seen: list[torch.Tensor] = []
                stream.capture(layer, group.linears[0], lambda x, mask, seen=seen: seen.append(x))
                for mine, expected in zip(seen, inputs[group.linears[0]], strict=True):
                    assert torch.allclose(mine, expected, rtol=1e-4, atol=1e-5), group.linears
            stream.advance(layer)


def test_padding_changes_no_hessian(tmp_path: Path) -> None:
    shell = build(LlamaConfig(**GATED), tmp_path)
    layers = derive_layout(shell.config).layers
    padded, short = batch(20, rows=1, padded=7), None
    short = Batch(padded.input_ids[:, :13], padded.mask[:, :13])
    hessians = []
    for b in (padded, short):
        stream = Stream(shell, layers, (b,))
        hessian = Hessian(48)
        for layer in layers[:2]:
            with shell.filled(shell.part(layer.name)):
                if layer is layers[1]:
                    stream.capture(layer, layer.groups[3].linears[0], hessian.update)
                stream.advance(layer)
        hessians.append(hessian)
    assert hessians[0].tokens == hessians[1].tokens == 13
    assert torch.allclose(hessians[0].mean("x"), hessians[1].mean("x"), rtol=1e-4, atol=1e-7)


def test_capture_sees_weights_that_were_replaced_before_it(tmp_path: Path) -> None:
    """True sequential: o_proj is solved on what the quantized q, k and v make of the input."""
    shell = build(LlamaConfig(**GATED), tmp_path)
    layer = derive_layout(shell.config).layers[0]
    stream = Stream(shell, (layer,), (batch(12),))
    before, after = Hessian(32), Hessian(32)
    with shell.filled(shell.part(layer.name)):
        stream.capture(layer, f"{layer.name}.self_attn.o_proj", before.update)
        shell.set_weight(f"{layer.name}.self_attn.v_proj", torch.zeros(16, 32))
        stream.capture(layer, f"{layer.name}.self_attn.o_proj", after.update)
    assert before.total.abs().max() > 0
    assert after.total.abs().max() == 0


def test_digest_tells_streams_apart_and_repeats(tmp_path: Path) -> None:
    shell = build(LlamaConfig(**GATED), tmp_path)
    layers = derive_layout(shell.config).layers
    digests = []
    for seed in (0, 0, 1):
        stream = Stream(shell, layers, (batch(12, seed=seed),))
        with shell.filled(shell.part(layers[0].name)):
            stream.advance(layers[0])
        digests.append(stream.digest())
    assert digests[0] == digests[1] != digests[2]
