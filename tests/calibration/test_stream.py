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
from llmquant.calibration.crossing import Crossing
from llmquant.calibration.stream import Stream
from llmquant.checkpoint.reader import Checkpoint
from llmquant.model.layout import Layer, derive_layout
from llmquant.model.shell import Shell
from llmquant.solve.moments import Moments

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


def stops(layer: Layer) -> tuple[str, ...]:
    return tuple(group.linears[0] for group in layer.groups)


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

    stream = Stream(shell, layers, batches, compared=True)
    for layer in layers:
        with shell.filled(shell.part(layer.name)), Crossing(stream, layer, stops(layer), stops(layer)[:-1]) as crossing:
            for group in layer.groups:
                samples = crossing.samples(group.linears[0])
                for sample, expected in zip(samples, inputs[group.linears[0]], strict=True):
                    assert torch.allclose(sample.x, expected, rtol=1e-4, atol=1e-5), group.linears
                    if group is layer.groups[-1]:
                        assert sample.original is None
                    else:
                        assert torch.equal(sample.original, sample.x)
            crossing.advance()


def test_padding_changes_no_hessian(tmp_path: Path) -> None:
    shell = build(LlamaConfig(**GATED), tmp_path)
    layers = derive_layout(shell.config).layers
    padded = batch(20, rows=1, padded=7)
    short = Batch(padded.input_ids[:, :13], padded.mask[:, :13])
    found = []
    for b in (padded, short):
        stream = Stream(shell, layers, (b,))
        with shell.filled(shell.part(layers[0].name)), Crossing(stream, layers[0]) as crossing:
            crossing.advance()
        moments, down = Moments(48), stops(layers[1])[-1]
        with shell.filled(shell.part(layers[1].name)), Crossing(stream, layers[1], (down,)) as crossing:
            for sample in crossing.samples(down):
                moments.update(sample.x, sample.mask)
        found.append(moments)
    assert found[0].tokens == found[1].tokens == 13
    assert torch.allclose(found[0].H("x"), found[1].H("x"), rtol=1e-4, atol=1e-7)


def test_a_linear_sees_what_was_replaced_before_it_and_the_twin_does_not(tmp_path: Path) -> None:
    """True sequential: o_proj is solved on what the quantized q, k and v make of the input."""
    shell = build(LlamaConfig(**GATED), tmp_path)
    layer = derive_layout(shell.config).layers[0]
    stream = Stream(shell, (layer,), (batch(12), batch(12, seed=1)), compared=True)
    before = list(stream.hidden)
    with (
        shell.filled(shell.part(layer.name)),
        Crossing(stream, layer, stops(layer)[:2], stops(layer)[:2]) as crossing,
    ):
        assert all(sample.x.abs().max() > 0 for sample in crossing.samples(stops(layer)[0]))
        shell.set_weight(f"{layer.name}.self_attn.v_proj", torch.zeros(16, 32))
        for sample in crossing.samples(f"{layer.name}.self_attn.o_proj"):
            assert sample.x.abs().max() == 0
            assert sample.original.abs().max() > 0
        assert all(map(torch.equal, stream.hidden, before))
        crossing.advance()
    assert not any(map(torch.equal, stream.hidden, stream.original))


def test_what_was_passed_and_then_changed_is_passed_again(tmp_path: Path) -> None:
    shell = build(LlamaConfig(**GATED), tmp_path)
    layer = derive_layout(shell.config).layers[0]
    value = f"{layer.name}.self_attn.v_proj"
    digests = []
    for changed_at in (stops(layer)[0], stops(layer)[-1]):
        stream = Stream(shell, (layer,), (batch(12), batch(9, seed=1)))
        with shell.filled(shell.part(layer.name)), Crossing(stream, layer, stops(layer)) as crossing:
            for stop in stops(layer):
                list(crossing.samples(stop))
                if stop == changed_at:
                    shell.set_weight(value, torch.zeros(16, 32))
                    crossing.again()
            crossing.advance()
        digests.append(stream.digest())
    assert digests[0] == digests[1]


def test_stops_have_an_order(tmp_path: Path) -> None:
    shell = build(LlamaConfig(**GATED), tmp_path)
    layer = derive_layout(shell.config).layers[0]
    stream = Stream(shell, (layer,), (batch(12),))
    with shell.filled(shell.part(layer.name)), Crossing(stream, layer, stops(layer)) as crossing:
        with pytest.raises(ValueError, match="not the next stop"):
            list(crossing.samples(stops(layer)[1]))
        with pytest.raises(ValueError, match="was not visited"):
            crossing.advance()


def test_digest_tells_streams_apart_and_repeats(tmp_path: Path) -> None:
    shell = build(LlamaConfig(**GATED), tmp_path)
    layers = derive_layout(shell.config).layers
    digests = []
    for seed in (0, 0, 1):
        stream = Stream(shell, layers, (batch(12, seed=seed),))
        with shell.filled(shell.part(layers[0].name)), Crossing(stream, layers[0]) as crossing:
            crossing.advance()
        digests.append(stream.digest())
    assert digests[0] == digests[1] != digests[2]
