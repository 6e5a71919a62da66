"""Tokens to text while they are made: whole characters only, and nothing of what ends an answer."""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Reader:
    """The text of one answer.

    Attributes:
        stopped: a stop string was met; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def read(self, token: int) -> str:
        """The text that is certain now; it may be empty."""
        self._held += self._stream.step(self._tokenizer, token) or ""
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return self.rest()
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """How much of the end of the text is the beginning of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
