"""From a recipe's calibration source to token batches that fit the model."""

from transformers import AutoModelForCausalLM

from llmquant.calibration.batches import Calibration, build
from llmquant.calibration.generate import continue_prompts
from llmquant.calibration.sources import load_documents
from llmquant.errors import CalibrationError
from llmquant.model.shell import Shell
from llmquant.model.tokenizer import load_tokenizer
from llmquant.recipe import Recipe


def prepare(recipe: Recipe, shell: Shell) -> Calibration:
    """Read, continue or tokenize the calibration text that `recipe` names.

    Raises:
        CalibrationError: the text or the tokenizer does not fit the model, or is too little for the recipe.
    """
    wanted = recipe.calibration
    tokenizer = load_tokenizer(shell.source.root, trust_remote_code=shell.source.trust_remote_code)
    documents = load_documents("builtin" if wanted.source == "self" else wanted.source)
    if wanted.source == "self":
        # Token by token, every layer at once: the one step that needs the whole model in memory.
        model = AutoModelForCausalLM.from_pretrained(
            shell.source.root, dtype=shell.dtype, trust_remote_code=shell.source.trust_remote_code
        ).eval()
        model.to(device=shell.device)
        documents = continue_prompts(
            model, tokenizer, documents, samples=wanted.samples, seq_len=wanted.seq_len, seed=recipe.seed
        )
        del model
    calibration = build(
        documents,
        tokenizer,
        samples=wanted.samples,
        seq_len=wanted.seq_len,
        vocab_size=shell.vocab_size,
        seed=recipe.seed,
    )
    if calibration.sequences < 2 and (recipe.method == "auto" or recipe.solver.train):
        raise CalibrationError(
            "calibration: this recipe judges by sequences that it holds out, and there is one only; "
            "give more text and samples, or --method gptq without training"
        )
    return calibration
