"""An example as a reader sees its tokens: what the model reads, and which of it the loss is taken on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pingjia.chat.tokenizer import StreamDecoder, Tokenizer
from pingjia.types import Encoded


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or the few that one character is made of. `learnt`: whether the loss is taken on them."""

    text: str
    learnt: bool
    special: bool = False
    num_tokens: int = 1


def render_example(encoded: Encoded, tokenizer: Tokenizer) -> list[Piece]:
    """The pieces of an example, in order. Their texts joined, special tokens aside, are what the tokenizer decodes.

    No piece reaches from what is read into what is learnt: a character that would is shown as broken.
    """
    return list(_Reader(tokenizer).read(encoded))


class _Reader:
    """Holds back tokens until their text is whole. Text between special tokens is decoded in one go, because what a
    token reads as can depend on its neighbours (spaces, mostly)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream: StreamDecoder = tokenizer.stream()
        self._num_held = 0
        self._learnt = False

    def read(self, encoded: Encoded) -> Iterator[Piece]:
        for token, learnt in zip(encoded.ids, encoded.learn, strict=True):
            name = self._tokenizer.special_text(token)
            if name is not None or learnt != self._learnt:
                yield from self._end()
            self._learnt = learnt
            if name is not None:
                yield Piece(name, learnt, special=True)
            else:
                yield from self._take(token)
        yield from self._end()

    def _take(self, token: int) -> Iterator[Piece]:
        self._num_held += 1
        if text := self._stream.feed([token]):
            yield self._piece(text)

    def _end(self) -> Iterator[Piece]:
        """What is held back, as it is; then decoding begins anew."""
        if self._num_held:
            yield self._piece(self._stream.flush())
        self._stream = self._tokenizer.stream()

    def _piece(self, text: str) -> Piece:
        piece, self._num_held = Piece(text, self._learnt, num_tokens=self._num_held), 0
        return piece
