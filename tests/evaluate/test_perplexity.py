"""Perplexity against values worked out by hand and by brute force."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmquant.errors import NumericsError, RecipeError
from llmquant.evaluate import perplexity as module
from llmquant.evaluate.perplexity import Protocol, log_probs, perplexity, windows

PROTOCOL = Protocol("t.txt (sha256 0123456789ab)", 16, 3, 45, False, "float32")
TEXT = "Quantization maps real weights to small integers. " * 12


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path):
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture
def model(tiny_checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 512, (3, 16), generator=torch.Generator().manual_seed(0))


def test_uniform_logits_give_the_vocabulary_size(model, ids):
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, ids, PROTOCOL)
    assert result.value == pytest.approx(512, rel=1e-12)
    assert result.nll == pytest.approx([math.log(512)] * 3)


def test_equals_brute_force(model, ids):
    nll = []
    with torch.no_grad():
        for window in ids:
            for t in range(1, len(window)):  # one forward per position, no future in sight
                logits = model(window[None, :t]).logits[0, -1].double()
                nll.append(float(logits.logsumexp(0) - logits[window[t]]))
    result = perplexity(model, ids, PROTOCOL)
    assert result.value == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-6)
    assert result.nll[1] == pytest.approx(sum(nll[15:30]) / 15, rel=1e-6)


def test_certain_model_has_perplexity_one(model):
    """A head that says what the embedding says: after token 7, token 7 for sure."""
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.randn(512, 64, generator=torch.Generator().manual_seed(1)))
        model.lm_head.weight.copy_(100 * model.model.embed_tokens.weight)
    assert perplexity(model, torch.full((1, 16), 7), PROTOCOL).value == pytest.approx(1.0)


def test_pieces_do_not_change_the_numbers(model, ids, monkeypatch):
    whole = perplexity(model, ids, PROTOCOL).nll
    monkeypatch.setattr(module, "PIECE", 512 * 4)
    pieces = list(log_probs(model, ids[0]))
    assert [logp.shape[0] for _, logp in pieces] == [4, 4, 4, 3]
    assert torch.equal(torch.cat([after for after, _ in pieces]).flatten(), ids[0, 1:])
    assert perplexity(model, ids, PROTOCOL).nll == pytest.approx(whole, rel=1e-12)


def test_a_dropped_iterator_leaves_no_inference_mode_behind(model, ids):
    next(log_probs(model, ids[0]))
    assert not torch.is_inference_mode_enabled()


def test_nan_logits_are_an_error(model, ids):
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(NumericsError, match="NaN or Inf"):
        perplexity(model, ids, PROTOCOL)


def test_windows_are_the_text_tokenized_once_without_remainder(tokenizer):
    all_ids = tokenizer(TEXT)["input_ids"]
    cut = windows(tokenizer, TEXT, 32)
    assert cut.shape == (len(all_ids) // 32, 32)
    assert len(all_ids) % 32
    assert cut.flatten().tolist() == all_ids[: cut.numel()]
    assert torch.equal(windows(tokenizer, TEXT, 32, 2), cut[:2])


def test_short_text_is_one_shorter_window(tokenizer):
    all_ids = tokenizer(TEXT)["input_ids"]
    assert windows(tokenizer, TEXT, 4096).tolist() == [all_ids]


@pytest.mark.parametrize(
    ("text", "seq_len", "most", "message"),
    [("", 32, None, "has 0 tokens"), (TEXT, 1, None, "--seq-len 1"), (TEXT, 32, 0, "--max-windows 0")],
)
def test_nothing_to_predict_is_an_error(tokenizer, text, seq_len, most, message):
    with pytest.raises(RecipeError, match=message):
        windows(tokenizer, text, seq_len, most)


def test_protocol_is_one_line():
    assert str(PROTOCOL) == (
        "t.txt (sha256 0123456789ab), tokenized whole without BOS, 3 windows of 16 without overlap, "
        "45 predicted tokens, float32"
    )
