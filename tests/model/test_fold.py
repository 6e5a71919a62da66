"""A scale that is folded leaves the model what it was."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, OPTConfig, PretrainedConfig, Qwen3_5TextConfig

from llmquant.checkpoint.reader import Checkpoint
from llmquant.model.fold import LinearFold, NormFold
from llmquant.model.layout import derive_layout
from llmquant.model.shell import Shell
from llmquant.scheme import Scheme, dequantize
from llmquant.solve.rtn import quantize_rtn

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 4}
LLAMA = LlamaConfig(**GATED)
GEMMA = Gemma2Config(head_dim=8, sliding_window=8, **GATED)
STATES = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRID = Qwen3_5TextConfig(head_dim=8, layer_types=["linear_attention"], **STATES, **GATED)
OPT = OPTConfig(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, **SIZES)
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def build(config: PretrainedConfig, directory: Path) -> Shell:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.1 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(directory)
    return Shell(Checkpoint.open(directory))


def scales(n: int) -> torch.Tensor:
    return torch.exp2(torch.randint(-2, 3, (n,), generator=torch.Generator().manual_seed(1)).float())


@pytest.mark.parametrize("config", [LLAMA, GEMMA, OPT, HYBRID], ids=lambda c: c.model_type)
def test_into_every_norm(config: PretrainedConfig, tmp_path: Path) -> None:
    shell = build(config, tmp_path)
    layer = derive_layout(shell.config).layers[0]
    with shell.filled(list(shell.names)), torch.no_grad():
        shell.model.tie_weights()
        before = shell.model(input_ids=IDS, use_cache=False).logits
        for group in layer.groups:
            if group.norm and group.foldable:
                fold = NormFold(shell, group.norm, layer.norm_offset)
                s = fold.settle(scales(32))
                for linear in group.linears:
                    shell.set_weight(linear, shell.model.get_parameter(f"{linear}.weight") * s)
                changed = fold.apply(s)
                assert set(changed) >= {f"{group.norm}.weight"}
                assert all(tensor.dtype == torch.bfloat16 for tensor in changed.values())
        after = shell.model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(s, scales(32)) == (layer.norm_offset == 0.0)
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=lambda c: c.model_type)
def test_into_every_linear(config: PretrainedConfig, tmp_path: Path) -> None:
    shell = build(config, tmp_path)
    layer = derive_layout(shell.config).layers[0]
    scheme = Scheme(4, -1)
    assert len(layer.folds) == 2
    with shell.filled(list(shell.names)), torch.no_grad():
        shell.model.tie_weights()
        quantized = {source: quantize_rtn(shell.read(f"{source}.weight").float(), scheme) for source, _ in layer.folds}
        for source, q in quantized.items():
            shell.set_weight(source, dequantize(q, scheme))
        before = shell.model(input_ids=IDS, use_cache=False).logits
        for source, target in layer.folds:
            fold = LinearFold(shell, source, quantized[source])
            W = shell.model.get_parameter(f"{target}.weight")
            s = fold.settle(scales(W.shape[1]))
            assert torch.equal(s, scales(W.shape[1]))
            folded, _ = fold.apply(s)
            assert torch.equal(folded.codes, quantized[source].codes)
            shell.set_weight(source, dequantize(folded, scheme))
            shell.set_weight(target, W * s)
        assert torch.allclose(before, shell.model(input_ids=IDS, use_cache=False).logits, atol=1e-5)


def test_a_scale_that_would_leave_the_range_of_fp16_is_not_taken(tmp_path: Path) -> None:
    shell = build(LLAMA, tmp_path)
    q = quantize_rtn(torch.full((8, 32), 2.0**-10), Scheme(4, -1))  # its scale is near the smallest
    assert LinearFold(shell, "x", q).settle(torch.tensor([1.0] * 7 + [2.0**9])).tolist() == [1.0] * 8
