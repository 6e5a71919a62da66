"""Self-generated calibration text: the model continues the openings of the built-in prompts.

What a model writes is closer to what it was trained on than any text chosen for it, and a reasoning or chat model
writes its own thinking and its own turns. The idea of quantizing with the model's own samples: LLM-QAT
(arXiv 2305.17888); of renewing calibration data with it: arXiv 2601.11200.
"""

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmquant.calibration.batches import encode
from llmquant.calibration.sources import Document
from llmquant.errors import CalibrationError, NumericsError

OPENING = 48  # prompt tokens at most, and never more than a quarter of the sequence: the rest is the model's own
TOP_K, TOP_P = 50, 0.95  # temperature 1 is the model's own distribution; its far tail is where long samples derail


@torch.inference_mode()
def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    samples: int,
    seq_len: int,
    seed: int,
    batch_size: int = 8,
) -> list[Document]:
    """`samples` documents of exactly `seq_len` token ids, each the model's continuation of a document's opening.

    Documents are taken in an order shuffled by `seed`, again from the start if there are too few. The source of a
    result is `self/` and the source of its opening. The same seed, model, device and batch size give the same ids.

    Generation does not stop at EOS: in training data another document, or in a chat another turn, follows it, so
    the model goes on to the next one by itself, and every sequence is full.

    Raises CalibrationError if no document has a token, NumericsError if the model's logits are not finite.
    """
    openings = [(encode(d, tokenizer)[: max(1, min(OPENING, seq_len // 4))], d) for d in documents]
    openings = [(ids, document) for ids, document in openings if ids]
    if not openings:
        raise CalibrationError("calibration: no document has a token for the model to continue; add text to the source")
    Random(seed).shuffle(openings)  # noqa: S311  (a reproducible shuffle, not a secret)
    chosen = [openings[i % len(openings)] for i in range(samples)]
    # openings of like length share a batch, each cut to the shortest: no padding, hence no mask to get wrong
    chosen.sort(key=lambda opening: len(opening[0]))
    generator = torch.Generator().manual_seed(seed)

    results = []
    for start in range(0, samples, batch_size):
        batch = chosen[start : start + batch_size]
        prompts = torch.tensor([ids[: len(batch[0][0])] for ids, _ in batch])
        written = _continue(model, prompts, seq_len, generator).tolist()
        for ids, (_, document) in zip(written, batch, strict=True):
            source = f"self/{document.source}"
            results.append(Document(source, f"{source}: from {document.where}", input_ids=tuple(ids)))
    return results


def _continue(model: PreTrainedModel, prompts: Tensor, seq_len: int, generator: torch.Generator) -> Tensor:
    """Prompts [B, P] continued to [B, seq_len], on the CPU. A loop of our own: `model.generate` would take over the
    stop tokens, penalties and filters of the checkpoint's generation_config.json."""
    ids, fed, cache = prompts, prompts, None
    while ids.shape[1] < seq_len:
        out = model(input_ids=fed.to(model.device), past_key_values=cache, use_cache=True)
        fed, cache = _draw(out.logits[:, -1], generator), out.past_key_values
        ids = torch.cat([ids, fed], dim=1)
    return ids


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One id [B, 1] per row of logits [B, V]: of the `TOP_K` likeliest, the fewest that hold `TOP_P` of their mass.

    The draw itself is made on the CPU, whose generator gives the same numbers whatever the model runs on.
    """
    likeliest, ids = (best.cpu() for best in logits.float().topk(min(TOP_K, logits.shape[-1])))  # sorted, [B, K]
    if not likeliest.isfinite().all():
        raise NumericsError("calibration: the model's logits are not finite; check the checkpoint for NaN and Inf")
    probabilities = likeliest.softmax(dim=-1)
    probabilities[probabilities.cumsum(dim=-1) - probabilities >= TOP_P] = 0
    return ids.gather(1, torch.multinomial(probabilities, 1, generator=generator))
