"""Examples -> rows of a file, in the layouts that `layouts.py` reads."""

from __future__ import annotations

import json
from typing import Any

from pingjia.chat.tools import as_row
from pingjia.types import Example, Message

_EXTRAS = ("domain", "lang", "topic", "source", "reference", "augmented_from")
_LISTS = ("facts", "images")


def row_of(example: Example) -> dict[str, Any]:
    """A row from which `parse_row` makes an equal example (but for `where`).

    Plain questions and answers become prompt/response with their history, anything else `messages`.
    """
    row = _as_prompt(example.messages) if _is_plain(example.messages) else _as_messages(example.messages)
    row |= {name: value for name in _EXTRAS if (value := getattr(example, name)) is not None}
    row |= {name: list(value) for name in _LISTS if (value := getattr(example, name))}
    if example.tools:
        row["tools"] = [json.loads(tool) for tool in example.tools]
    if example.weight != 1:
        row["weight"] = example.weight
    return row


def _is_plain(messages: tuple[Message, ...]) -> bool:
    roles = [m.role for m in messages if m.role != "system"]
    is_plain = all(m.learn and not m.tool_calls for m in messages)
    return roles == ["user", "assistant"] * (len(roles) // 2) and is_plain


def _as_prompt(messages: tuple[Message, ...]) -> dict[str, Any]:
    system = [m.content for m in messages if m.role == "system"]
    texts = [m.content for m in messages if m.role != "system"]
    row: dict[str, Any] = {"prompt": texts[-2], "response": texts[-1]}
    if len(texts) > 2:
        row["history"] = [[texts[i], texts[i + 1]] for i in range(0, len(texts) - 2, 2)]
    return row | ({"system": system[0]} if system else {})


def _as_messages(messages: tuple[Message, ...]) -> dict[str, Any]:
    return {"messages": [as_row(m) if m.learn else {**as_row(m), "weight": 0} for m in messages]}
