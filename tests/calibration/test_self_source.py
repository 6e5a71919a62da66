"""Text that the model writes itself, with a tiny random Llama."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmquant.calibration.batches import build, encode
from llmquant.calibration.generate import OPENING, _continue, _draw, continue_prompts
from llmquant.calibration.sources import Document, load_documents
from llmquant.errors import CalibrationError, NumericsError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_every_document_is_full_and_begins_with_a_prompt(
    model: LlamaForCausalLM, make_tokenizer: MakeTokenizer
) -> None:
    prompts, tokenizer = load_documents("builtin"), make_tokenizer()
    written = continue_prompts(model, tokenizer, prompts, samples=12, seq_len=256, seed=3)
    openings = {tuple(encode(prompt, tokenizer)[:OPENING]): prompt.source for prompt in prompts}
    assert len(written) == 12
    for document in written:
        assert document.input_ids is not None
        assert len(document.input_ids) == 256
        assert document.source == "self/" + openings[document.input_ids[:OPENING]]


def test_the_result_is_calibration_input(model: LlamaForCausalLM, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    written = continue_prompts(model, tokenizer, load_documents("builtin"), samples=5, seq_len=32, seed=0)
    calibration = build(written, tokenizer, samples=5, seq_len=32, vocab_size=512, seed=0)
    assert sum(calibration.tokens.values()) == 5 * 32
    assert all(source.startswith("self/") for source in calibration.tokens)


def test_the_seed_decides_and_the_global_generator_does_not(
    model: LlamaForCausalLM, make_tokenizer: MakeTokenizer
) -> None:
    prompts, tokenizer = load_documents("builtin"), make_tokenizer()

    def write(seed: int) -> list[Document]:
        return continue_prompts(model, tokenizer, prompts, samples=4, seq_len=48, seed=seed, batch_size=2)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = write(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert write(7) == first
    assert {document.where for document in write(8)} != {document.where for document in first}  # other prompts

    def retell(seed: int) -> list[Document]:
        return continue_prompts(model, tokenizer, prompts[:1], samples=2, seq_len=48, seed=seed)

    assert retell(7) != retell(8)  # and the same prompt in other words


def test_more_samples_than_prompts(model: LlamaForCausalLM, make_tokenizer: MakeTokenizer) -> None:
    """A prompt that is used again is continued in another way."""
    prompt = Document("story", "story.txt", text="It was a dark and stormy night, and the tokenizer was small.")
    written = continue_prompts(model, make_tokenizer(), [prompt], samples=3, seq_len=40, seed=0, batch_size=2)
    assert len({document.input_ids for document in written}) == 3
    assert len({document.input_ids[:10] for document in written if document.input_ids}) == 1


def test_prompts_of_other_lengths_share_a_batch_without_padding(
    model: LlamaForCausalLM, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer()
    prompts = [Document("s", "s", text="tiny"), Document("l", "l", text="a passage that is a good deal longer")]
    short, long = continue_prompts(model, tokenizer, prompts, samples=2, seq_len=64, seed=0)
    assert (short.source, long.source) == ("self/s", "self/l")
    assert long.input_ids is not None
    start = len(encode(prompts[0], tokenizer))
    assert long.input_ids[:start] == tuple(encode(prompts[1], tokenizer)[:start])


def test_the_cache_changes_nothing(model: LlamaForCausalLM) -> None:
    """Token by token with the cache, the ids are those of whole forward passes and the same draws."""
    prompts = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.inference_mode():
        cached = _continue(model, prompts, 20, torch.Generator().manual_seed(0))
        generator, ids = torch.Generator().manual_seed(0), prompts
        for _ in range(16):
            ids = torch.cat([ids, _draw(model(ids).logits[:, -1], generator)], dim=1)
    assert torch.equal(cached, ids)


def test_draws_stay_in_the_nucleus_and_follow_the_probabilities() -> None:
    logits = torch.tensor([0.6, 0.3, 0.08, 0.02]).log().expand(20_000, 4)
    share = torch.bincount(_draw(logits, torch.Generator().manual_seed(0)).flatten(), minlength=4) / 20_000
    # 0.6 + 0.3 < 0.95 <= 0.6 + 0.3 + 0.08: the last one is outside
    torch.testing.assert_close(share, torch.tensor([0.6, 0.3, 0.08, 0]) / 0.98, rtol=0, atol=0.015)
    assert share[3] == 0


def test_logits_that_are_not_finite() -> None:
    with pytest.raises(NumericsError, match="logits are not finite"):
        _draw(torch.tensor([[0.0, float("nan"), 1.0]]), torch.Generator())


def test_nothing_to_continue(model: LlamaForCausalLM, make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(CalibrationError, match="no document has a token"):
        continue_prompts(model, make_tokenizer(), [Document("a", "a", text="")], samples=2, seq_len=32, seed=0)
