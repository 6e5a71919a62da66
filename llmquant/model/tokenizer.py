"""The checkpoint's own tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmquant.errors import CheckpointError


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint directory.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if not directory.is_dir():  # transformers would take the path for a Hub name
        raise CheckpointError(f"{directory}: no such directory; give a checkpoint on this disk")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken file gives anything from OSError to KeyError to a bare Exception
        cause = str(error).partition("\n")[0]
        raise CheckpointError(f"{directory}: its tokenizer cannot be loaded ({cause}); restore its files") from error


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """What the model continues when it answers, by its chat template; special tokens are in it already."""
    return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
