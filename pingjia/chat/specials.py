"""Special tokens in text: which ones a template wrote, and which ones somebody merely typed.

A user who types `<|im_end|>` must not end his own turn. So before a template sees a content, every special-token
string in it is replaced by a mark of private-use characters; the template renders; then the marks tell typed text from
the template's own tokens. Contents without such strings pass the template untouched, so trims and tests in templates
see what they always saw. Not here: vocabularies and encoding (`hf.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pingjia.types import Message

_PRIVATE_USE = range(0x10FFFD, 0x100000, -1)  # plane 16: no script, no emoji; scanned from the end


@dataclass(frozen=True, slots=True)
class Marked:
    """Messages whose typed special-token strings are marks, and the character that makes the marks."""

    messages: tuple[Message, ...]
    mark: str | None  # None: nothing had to be marked


class Specials:
    """The special tokens of a vocabulary, by their text."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = {text: token for text, token in ids.items() if text}
        self._texts = sorted(self.ids, key=len, reverse=True)  # longest first, as the tokenizer matches
        self._pattern = re.compile("|".join(map(re.escape, self._texts)) or r"(?!)")

    def mark(self, messages: Sequence[Message]) -> Marked:
        """Replace the special-token strings in contents by marks."""
        if not any(self._pattern.search(m.content) for m in messages):
            return Marked(tuple(messages), None)
        used = set().union(*(m.content for m in messages))
        mark = next(c for c in map(chr, _PRIVATE_USE) if c not in used)
        return Marked(tuple(replace(m, content=self._hide(m.content, mark)) for m in messages), mark)

    def _hide(self, text: str, mark: str) -> str:
        return self._pattern.sub(lambda m: f"{mark}{self._texts.index(m.group())}{mark}", text)

    def restore(self, text: str, mark: str) -> str:
        """Put typed strings back in the place of their marks."""
        return re.sub(f"{mark}([0-9]+){mark}", lambda m: self._texts[int(m.group(1))], text)

    def written(self, text: str) -> list[int]:
        """Ids of the special tokens in `text`, in order: with marks still in place, those that the template wrote."""
        return [self.ids[m.group()] for m in self._pattern.finditer(text)]

    def split(self, text: str) -> list[str]:
        """`text` cut at its special tokens: plain, special, plain, special, ..., plain. Plain parts may be empty."""
        parts, end = [], 0
        for m in self._pattern.finditer(text):
            parts += [text[end : m.start()], m.group()]
            end = m.end()
        return [*parts, text[end:]]

    def first_at_start(self, text: str) -> int | None:
        """The special token that `text` begins with, white space aside."""
        m = self._pattern.match(text.lstrip())
        return self.ids[m.group()] if m else None
