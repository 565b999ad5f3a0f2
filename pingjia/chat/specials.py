"""Special tokens in text: which ones a template wrote, and which ones somebody merely typed.

A user who types `<|im_end|>` must not end his own turn. So before a template sees a content, every special-token
string in it is replaced by a mark of private-use characters; the template renders; then the marks tell typed text from
the template's own tokens. Contents without such strings pass the template untouched, so trims and tests in templates
see what they always saw. Not here: vocabularies and encoding (`hf.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pingjia.chat.calls import canonical
from pingjia.types import Message, ToolCall

_PRIVATE_USE = range(0x10FFFD, 0x100000, -1)  # plane 16: no script, no emoji; scanned from the end


@dataclass(frozen=True, slots=True)
class Marked:
    """A conversation whose typed special-token strings are marks, and the character that makes the marks."""

    messages: tuple[Message, ...]
    mark: str | None  # None: nothing had to be marked
    tools: tuple[Mapping[str, Any], ...] = ()


class Specials:
    """The special tokens of a vocabulary, by their text."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = {text: token for text, token in ids.items() if text}
        self._texts = sorted(self.ids, key=len, reverse=True)  # longest first, as the tokenizer matches
        self._pattern = re.compile("|".join(map(re.escape, self._texts)) or r"(?!)")

    def mark(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Marked:
        """Replace the special-token strings in contents, calls and tools by marks."""
        texts = [*(text for m in messages for text in _texts_of(m)), *map(canonical, tools)]
        if not any(map(self._pattern.search, texts)):
            return Marked(tuple(messages), None, tuple(tools))
        used = set().union(*texts)
        mark = next(c for c in map(chr, _PRIVATE_USE) if c not in used)
        hidden = tuple(self._hide_message(m, mark) for m in messages)
        return Marked(hidden, mark, tuple(self._hide_in(tool, mark) for tool in tools))

    def _hide(self, text: str, mark: str) -> str:
        return self._pattern.sub(lambda m: f"{mark}{self._texts.index(m.group())}{mark}", text)

    def _hide_message(self, message: Message, mark: str) -> Message:
        return replace(
            message,
            content=self._hide(message.content, mark),
            tool_calls=tuple(self._hide_call(call, mark) for call in message.tool_calls),
            name=self._hide(message.name, mark),
            tool_call_id=self._hide(message.tool_call_id, mark),
        )

    def _hide_call(self, call: ToolCall, mark: str) -> ToolCall:
        arguments = canonical(self._hide_in(json.loads(call.arguments), mark))
        return ToolCall(self._hide(call.name, mark), arguments, self._hide(call.id, mark))

    def _hide_in(self, value: Any, mark: str) -> Any:
        """A JSON value with every string in it hidden, keys too."""
        if isinstance(value, str):
            return self._hide(value, mark)
        if isinstance(value, list):
            return [self._hide_in(v, mark) for v in value]
        if isinstance(value, dict):
            return {self._hide(k, mark): self._hide_in(v, mark) for k, v in value.items()}
        return value

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


def _texts_of(message: Message) -> Iterator[str]:
    yield message.content
    if message.tool_calls or message.name or message.tool_call_id:
        yield from (message.name, message.tool_call_id)
        yield from (text for call in message.tool_calls for text in (call.name, call.arguments, call.id))
