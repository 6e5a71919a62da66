from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmquant.calibration.batches import Calibration, build, encode
from llmquant.calibration.sources import Document, Message, load_documents
from llmquant.errors import CalibrationError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
VOCAB = 512
BOS, EOS = 0, 1


def make(documents: list[Document], tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Calibration:
    options = {"samples": 1000, "seq_len": 32, "vocab_size": VOCAB, "seed": 0} | changes
    return build(documents, tokenizer, **options)


def text(passage: str, source: str = "a.txt") -> Document:
    return Document(source, source, text=passage)


def ids(*tokens: int, source: str = "ids") -> Document:
    return Document(source, f"calib.jsonl: line {tokens[0] if tokens else 0}", input_ids=tokens)


def sequences(calibration: Calibration) -> list[list[int]]:
    return [
        row[keep].tolist()
        for batch in calibration.batches
        for row, keep in zip(batch.input_ids, batch.mask, strict=True)
    ]


def test_builtin_gives_full_sequences_and_counts_every_token(make_tokenizer: MakeTokenizer) -> None:
    calibration = make(load_documents("builtin"), make_tokenizer(), samples=40, seq_len=256, batch_size=4)
    assert calibration.sequences == 40
    assert {len(sequence) for sequence in sequences(calibration)} == {256}
    assert sum(calibration.tokens.values()) == 40 * 256
    assert set(calibration.tokens) == {document.source for document in load_documents("builtin")}
    assert [batch.input_ids.shape for batch in calibration.batches] == [(4, 256)] * 10
    assert calibration.batches[0].input_ids.dtype == torch.int64
    assert calibration.batches[0].mask.dtype == torch.bool


def test_the_seed_decides_and_the_batch_size_does_not(make_tokenizer: MakeTokenizer) -> None:
    documents, tokenizer = load_documents("builtin"), make_tokenizer()
    first = make(documents, tokenizer, samples=20, batch_size=1)
    again = make(documents, tokenizer, samples=20, batch_size=8)
    other = make(documents, tokenizer, samples=20, seed=1)
    assert first.digest == again.digest != other.digest
    assert sequences(first) == sequences(again) != sequences(other)


def test_packing_loses_and_invents_nothing(make_tokenizer: MakeTokenizer) -> None:
    """The sequences, joined, are the documents, joined: each followed by EOS, shuffled, less a rest of under 8 ids."""
    tokenizer = make_tokenizer()
    documents = [text(f"Passage number {i}, which is not long.") for i in range(20)]
    joined = [token for sequence in sequences(make(documents, tokenizer)) for token in sequence]
    assert sum(len(tokenizer(document.text).input_ids) + 1 for document in documents) - len(joined) < 8
    passages, given = str(tokenizer.decode(joined)).split("<eos>")[:-1], [document.text for document in documents]
    assert len(set(passages)) == len(passages) >= 19
    assert set(passages) <= set(given)
    assert passages != given[: len(passages)]


def test_bos_starts_every_sequence_where_the_tokenizer_adds_it(make_tokenizer: MakeTokenizer) -> None:
    documents = [text("A long passage of ordinary words. " * 20), text("Short and quite different, this one.")]
    with_bos = make(documents, make_tokenizer(bos=True))
    without = make(documents, make_tokenizer(bos=False))
    assert all(sequence[0] == BOS and sequence[1] != BOS for sequence in sequences(with_bos))
    assert "the tokenizer puts a BOS token before text" in with_bos.notes
    assert not any(BOS in sequence for sequence in sequences(without))
    assert "the tokenizer puts no BOS token before text" in without.notes


def test_a_tokenizer_without_eos_joins_without_it(make_tokenizer: MakeTokenizer) -> None:
    calibration = make([text("one passage of words"), text("another one of words")], make_tokenizer(eos=False))
    assert not any(EOS in sequence for sequence in sequences(calibration))


def test_conversations_go_through_the_chat_template(make_tokenizer: MakeTokenizer) -> None:
    talk = (Message("user", "What is the tide?"), Message("assistant", "The sea, breathing."))
    document = Document("chat", "chat", messages=talk)
    tokenizer = make_tokenizer(chat=True, bos=True)
    (sequence,) = sequences(make([document], tokenizer))
    assert tokenizer.decode(sequence[1:]) == "<|user|>What is the tide?<eos><|assistant|>The sea, breathing.<eos>"

    assert encode(document, tokenizer) == sequence[1:]  # the template writes what it wants, BOS comes from packing

    plain = make([document], make_tokenizer(chat=False))
    assert tokenizer.decode(sequences(plain)[0]) == "What is the tide?\n\nThe sea, breathing.<eos>"
    assert "1 conversations joined as plain text: the tokenizer has no chat template" in plain.notes


def test_a_conversation_that_the_template_refuses_is_named(make_tokenizer: MakeTokenizer) -> None:
    document = Document("chat", "chat.jsonl: line 3", messages=(Message("tool", "42"),))
    with pytest.raises(CalibrationError, match=r"^chat\.jsonl: line 3: .*refuses.*only user and assistant"):
        make([document], make_tokenizer(chat=True))


def test_every_builtin_conversation_passes_a_strict_template(make_tokenizer: MakeTokenizer) -> None:
    assert make(load_documents("builtin"), make_tokenizer(chat=True)).sequences > 100


def test_rows_of_ids_are_used_as_they_are(make_tokenizer: MakeTokenizer) -> None:
    rows = [ids(*range(i, i + 40)) for i in range(10, 20)]
    calibration = make(rows, make_tokenizer(bos=True), samples=4)
    assert sequences(calibration) == [list(range(i, i + 32)) for i in range(10, 14)]
    assert calibration.tokens == {"ids": 4 * 32}
    assert calibration.notes == ()


def test_repeated_rows_of_ids_are_used_and_counted(make_tokenizer: MakeTokenizer) -> None:
    calibration = make([ids(*range(10, 20))] * 3, make_tokenizer())
    assert calibration.sequences == 3
    assert calibration.notes == ("2 rows of ids are exact repeats of others: used, as given",)


def test_text_fills_the_room_that_rows_leave(make_tokenizer: MakeTokenizer) -> None:
    documents = [text("Words upon words. " * 200), ids(*range(10, 42)), ids(*range(50, 82))]
    calibration = make(documents, make_tokenizer(), samples=5)
    assert sequences(calibration)[:2] == [list(range(10, 42)), list(range(50, 82))]
    assert calibration.tokens == {"a.txt": 3 * 32, "ids": 2 * 32}


def test_a_long_text_is_sampled_all_over(make_tokenizer: MakeTokenizer) -> None:
    words = " ".join(str(i) for i in range(4000))
    calibration = make([text(words)], make_tokenizer(), samples=8, seq_len=64)
    decoded = [str(make_tokenizer().decode(sequence)).split()[1] for sequence in sequences(calibration)]
    starts = [int(number) for number in decoded]
    assert starts == sorted(starts)
    assert starts[-1] - starts[0] > 1000


@pytest.mark.parametrize(("rest", "kept"), [(7, False), (8, True), (31, True)])
def test_the_rest_is_kept_padded_if_it_is_a_quarter(make_tokenizer: MakeTokenizer, rest: int, kept: bool) -> None:
    passage = "a" * (64 + rest)
    tokenizer = make_tokenizer(eos=False)
    tokenizer.backend_tokenizer.model = type(tokenizer.backend_tokenizer.model)(
        {"a": 2, **{f"x{i}": i for i in (0, 1)}}, []
    )
    calibration = make([text(passage)], tokenizer, batch_size=8)
    (batch,) = calibration.batches
    assert batch.input_ids.shape == (2 + kept, 32)
    assert batch.mask.sum() == 64 + rest * kept == sum(calibration.tokens.values())
    assert not batch.input_ids[~batch.mask].any()


def test_without_packing_each_document_is_a_sequence(make_tokenizer: MakeTokenizer) -> None:
    documents = [
        text("Words upon words, " * 30, "long"),
        text("A shorter passage of words.", "short"),
        text("Hi", "hi"),
    ]
    calibration = make(documents, make_tokenizer(), pack=False, batch_size=2)
    (batch,) = calibration.batches
    assert batch.mask.sum(dim=1).tolist() == [32, calibration.tokens["short"]]
    assert "hi" not in calibration.tokens
    assert "1 documents dropped: shorter than 8 tokens" in calibration.notes


def test_repeats_and_blanks_are_dropped_and_counted(make_tokenizer: MakeTokenizer) -> None:
    documents = [text("The same passage, twice over."), text("The same passage, twice over."), text(" \n")]
    calibration = make(documents, make_tokenizer())
    assert calibration.sequences == 1
    assert calibration.notes[:2] == ("1 documents dropped: exact repeats of others", "1 documents dropped: blank")


@pytest.mark.parametrize(
    "documents",
    [
        [text("one")],
        [text("")],
        [ids()],  # every id masked
        [ids(5)],
        [ids(5, 6, 7), ids(8, 9, 10)],
    ],
)
def test_too_little_to_calibrate_on(make_tokenizer: MakeTokenizer, documents: list[Document]) -> None:
    with pytest.raises(CalibrationError, match="give no sequence of 8 tokens; add text"):
        make(documents, make_tokenizer())


def test_a_short_text_is_enough_for_one_sequence(make_tokenizer: MakeTokenizer) -> None:
    calibration = make([text("Just enough words to count for something.")], make_tokenizer(), seq_len=2048)
    assert calibration.sequences == 1
    assert calibration.batches[0].mask.all()


def test_ids_outside_the_vocabulary(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(CalibrationError, match=r"^calib\.jsonl: line 10: token id 512 is outside .* of 512; "):
        make([ids(*range(20, 40)), ids(10, 512)], make_tokenizer())
    with pytest.raises(CalibrationError, match=r"^a\.txt: token id \d+ is outside the model's vocabulary of 100"):
        make([text("Ordinary words in an ordinary order.")], make_tokenizer(), vocab_size=100)
    assert make([ids(*range(504, 512))], make_tokenizer()).tokens == {"ids": 8}


def test_an_embedding_with_more_rows_than_the_tokenizer_is_noted(make_tokenizer: MakeTokenizer) -> None:
    passage = [text("Ordinary words in an ordinary order.")]
    assert (
        "the tokenizer has 512 tokens, the model's embedding 640 rows"
        in make(passage, make_tokenizer(), vocab_size=640).notes
    )
    assert not any("rows" in note for note in make(passage, make_tokenizer()).notes)


@pytest.mark.parametrize("changes", [{"samples": 0}, {"seq_len": 7}, {"seq_len": 1}])
def test_sizes_that_make_no_sense(make_tokenizer: MakeTokenizer, changes: dict[str, int]) -> None:
    with pytest.raises(CalibrationError, match="ask for at least 1 sample of 8"):
        make([text("words " * 50)], make_tokenizer(bos=True), **changes)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=12),
    batch_size=st.integers(1, 5),
    samples=st.integers(1, 12),
)
def test_masks_and_counts_agree(
    make_tokenizer: MakeTokenizer, lengths: list[int], batch_size: int, samples: int
) -> None:
    rows = [ids(*range(2, 2 + length), source=f"row {i}") for i, length in enumerate(lengths)]
    used = [(row, min(len(row.input_ids or ()), 32)) for row in rows if len(row.input_ids or ()) >= 8][:samples]
    if not used:
        return
    calibration = make(rows, make_tokenizer(), batch_size=batch_size, samples=samples)
    assert calibration.tokens == dict(Counter({row.source: length for row, length in used}))
    assert sum(int(batch.mask.sum()) for batch in calibration.batches) == sum(length for _, length in used)
    for batch in calibration.batches:
        length = batch.mask.sum(dim=1)
        assert batch.input_ids.shape[1] == length.max()  # never wider than its longest sequence
        assert torch.equal(batch.mask, torch.arange(batch.mask.shape[1]) < length[:, None])  # padding on the right


def test_right_padding_changes_no_real_token(make_tokenizer: MakeTokenizer) -> None:
    """The claim that lets a batch go without an attention mask."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rows = [ids(*range(10, 42)), ids(*range(60, 70))]
    (padded,) = make(rows, make_tokenizer(), batch_size=2).batches
    (_, alone) = make(rows, make_tokenizer(), batch_size=1).batches
    with torch.no_grad():
        in_batch = model(padded.input_ids).logits[1][padded.mask[1]]
        by_itself = model(alone.input_ids).logits[0]
    torch.testing.assert_close(in_batch, by_itself, rtol=1e-5, atol=1e-6)
