"""From a recipe's calibration source to token batches that fit the model."""

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from llmquant.calibration.batches import Calibration, build
from llmquant.calibration.generate import continue_prompts
from llmquant.calibration.sources import load_documents
from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import CalibrationError
from llmquant.model.shell import Shell
from llmquant.recipe import Recipe


def prepare(recipe: Recipe, shell: Shell) -> Calibration:
    """Read, continue or tokenize the calibration text that `recipe` names.

    Raises:
        CalibrationError: the text or the tokenizer does not fit the model.
    """
    wanted = recipe.calibration
    tokenizer = load_tokenizer(shell.source)
    documents = load_documents("builtin" if wanted.source == "self" else wanted.source)
    if wanted.source == "self":
        # Token by token, every layer at once: the one step that needs the whole model in memory.
        model = AutoModelForCausalLM.from_pretrained(shell.source.root, dtype=shell.dtype).to(shell.device).eval()
        documents = continue_prompts(
            model, tokenizer, documents, samples=wanted.samples, seq_len=wanted.seq_len, seed=recipe.seed
        )
        del model
    return build(
        documents,
        tokenizer,
        samples=wanted.samples,
        seq_len=wanted.seq_len,
        vocab_size=shell.model.get_input_embeddings().num_embeddings,
        seed=recipe.seed,
    )


def load_tokenizer(source: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer.

    Raises:
        CalibrationError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(source.root, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise CalibrationError(f"{source.root}: its tokenizer cannot be loaded: {reason}") from error
