"""The next token, by the probabilities that the model gives."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmquant.errors import NumericsError
from llmquant.server.protocol import Request


@dataclass(frozen=True)
class Sampling:
    """How to choose. Temperature 0: always the most likely token."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    repetition_penalty: float = 1.0
    seed: int | None = None  # None: another one each time

    @classmethod
    def of(cls, asked: Request, config: GenerationConfig) -> "Sampling":
        """What was asked for; else what the model's makers recommend; else all of the model's distribution."""
        found = {}
        for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
            given = getattr(asked, name)
            value = getattr(config, name, None) if given is None else given
            found[name] = getattr(cls, name) if value is None else value
        return cls(**found, seed=asked.seed)


class Sampler:
    """Chooses the tokens of one answer, on the CPU wherever the model is."""

    def __init__(self, sampling: Sampling) -> None:
        self._greedy = sampling.temperature == 0
        self._generator = torch.Generator()
        self._generator.seed() if sampling.seed is None else self._generator.manual_seed(sampling.seed)
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if not self._greedy:
            self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._processors.append(TopPLogitsWarper(float(sampling.top_p)))

    def choose(self, logits: Tensor, ids: list[int]) -> int:
        """The token after `ids`, from logits [vocab].

        Raises:
            NumericsError: a logit is NaN or Inf.
        """
        logits = logits.float().cpu()
        if not all(map(math.isfinite, torch.aminmax(logits))):  # a NaN is both
            raise NumericsError("the model's logits are not finite")
        if self._processors:
            logits = self._processors(torch.LongTensor([ids]), torch.FloatTensor(logits[None]))[0]
        if self._greedy:
            return int(logits.argmax())
        return int(torch.multinomial(logits.softmax(0), 1, generator=self._generator))
