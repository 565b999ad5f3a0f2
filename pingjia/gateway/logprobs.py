"""Log probabilities as text: which piece of the answer each token is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pingjia.chat.tokenizer import Tokenizer
from pingjia.types import TokenLogprob

_FLOOR = -9999.0  # JSON has no -inf; this is the number OpenAI uses for it
_CONTEXT = 4  # tokens before an alternative that decide whether it starts with a space


@dataclass(frozen=True, slots=True)
class ReadableToken:
    """A token and its alternatives with their texts. A token that ends inside a character has the text ""."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


class LogprobReader:
    """Reads the log probabilities of one answer in order. The texts of its chosen tokens, joined, are its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream()
        self._recent: list[int] = []

    def read(self, logprobs: Sequence[TokenLogprob]) -> list[ReadableToken]:
        """The next tokens of the answer."""
        return [self._read_one(entry) for entry in logprobs]

    def _read_one(self, entry: TokenLogprob) -> ReadableToken:
        text = self._decoder.feed([entry.token_id])
        top = tuple(
            (text if token_id == entry.token_id else self._alternative(token_id), max(logprob, _FLOOR))
            for token_id, logprob in entry.top
        )
        self._recent = [*self._recent, entry.token_id][-_CONTEXT:]
        return ReadableToken(text, max(entry.logprob, _FLOOR), top)

    def _alternative(self, token_id: int) -> str:
        # Alone, a token loses its leading space in some families; so take what it adds to the tokens before it.
        before = self._tokenizer.decode(self._recent)
        after = self._tokenizer.decode([*self._recent, token_id])
        return after[len(before) :] if after.startswith(before) else self._tokenizer.decode([token_id])
