"""Real tokenizers, small: trained on the built-in prompts, with whatever special tokens a test asks for."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmquant.calibration.sources import load_documents

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<eos>"
    "{% endfor %}"
)


@pytest.fixture(scope="session")
def trained() -> str:
    """A byte-level BPE of 512 tokens, as JSON; `<bos>` is 0, `<eos>` is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator((d.text for d in load_documents("builtin") if d.text), trainer)
    return tokenizer.to_str()


@pytest.fixture
def make_tokenizer(trained: str) -> Callable[..., PreTrainedTokenizerFast]:
    def make(*, bos: bool = False, eos: bool = True, chat: bool = False) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer.from_str(trained)
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
        special = {"bos_token": "<bos>"} if bos else {}
        special |= {"eos_token": "<eos>"} if eos else {}
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        fast.chat_template = CHAT_TEMPLATE if chat else None
        return fast

    return make
