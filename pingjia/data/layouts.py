"""The layouts of a row: which keys mean the question, the answer and what went before.

Recognised by their keys, row by row, without registration: prompt/response, alpaca, ShareGPT, OpenAI messages,
context/target. Not here: files and JSON (`rows.py`), lengths and duplicates (`check.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pingjia.recipe import near_miss
from pingjia.types import Example, Message

Faults = list[tuple[str, str]]
"""(field, reason) pairs; empty when a row is sound."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_STRINGS = ("domain", "lang", "topic", "source", "reference")
_LISTS = ("facts", "images")


@dataclass(slots=True)
class Parsed:
    """What a row became. `example` is None when there are faults; `unread` are keys that mean nothing here."""

    layout: str | None = None
    example: Example | None = None
    faults: Faults = field(default_factory=list)
    unread: tuple[str, ...] = ()


def parse_row(row: dict[str, Any], where: str) -> Parsed:
    """Recognise a row and turn it into an Example, or say everything that is wrong with it."""
    layout = _recognise(row)
    if layout is None:
        return Parsed(faults=[("layout", _unknown(row))])
    faults: Faults = []
    messages = layout.read(row, faults)
    extras = _extras(row, faults)
    if not faults:
        _check_order(messages, layout.list_key, len(messages) - _num_listed(row, layout), faults)
    if "facts" in extras:
        _check_facts(messages, extras["facts"], faults)
    unread = tuple(k for k in row if k not in _KNOWN[layout.name])
    example = None if faults else Example(messages=tuple(messages), where=where, **extras)
    return Parsed(layout.name, example, faults, unread)


# ---- the layouts


def _read_prompt(row: dict[str, Any], faults: Faults) -> list[Message]:
    turns = [*_system(row, faults), *_history(row, faults)]
    return [*turns, *_pair(_text(row, "prompt", faults), _text(row, "response", faults))]


def _read_alpaca(row: dict[str, Any], faults: Faults) -> list[Message]:
    turns = [*_system(row, faults), *_history(row, faults)]
    # Either half of the question may be empty, not both.
    has_input = isinstance(row.get("input"), str) and row["input"].strip()
    instruction = _text(row, "instruction", faults, may_be_empty=bool(has_input))
    extra = _text(row, "input", faults, may_be_empty=True, default="")
    question = "\n".join(part for part in (instruction, extra) if part.strip())
    return [*turns, *_pair(question, _text(row, "output", faults))]


def _read_context(row: dict[str, Any], faults: Faults) -> list[Message]:
    return _pair(_text(row, "context", faults), _text(row, "target", faults))


def _read_sharegpt(row: dict[str, Any], faults: Faults) -> list[Message]:
    return [*_system(row, faults), *_turns(row, "conversations", faults)]


def _read_messages(row: dict[str, Any], faults: Faults) -> list[Message]:
    return _turns(row, "messages", faults)


@dataclass(frozen=True, slots=True)
class _Layout:
    name: str
    marks: tuple[str, ...]  # any of these keys tells the layout
    keys: tuple[str, ...]  # everything that is read, besides the extras
    read: Callable[[dict[str, Any], Faults], list[Message]]
    list_key: str = "history"  # the field to name when turns are out of order


_LAYOUTS = (
    _Layout("messages", ("messages",), ("messages",), _read_messages, "messages"),
    _Layout("sharegpt", ("conversations",), ("conversations", "system"), _read_sharegpt, "conversations"),
    _Layout("prompt", ("prompt", "response"), ("prompt", "response", "history", "system"), _read_prompt),
    _Layout("alpaca", ("instruction", "output"), ("instruction", "input", "output", "history", "system"), _read_alpaca),
    _Layout("context", ("context", "target"), ("context", "target"), _read_context),
)
LAYOUTS = tuple(layout.name for layout in _LAYOUTS)
_KNOWN = {layout.name: frozenset((*layout.keys, *_STRINGS, *_LISTS)) for layout in _LAYOUTS}


def _recognise(row: dict[str, Any]) -> _Layout | None:
    for layout in _LAYOUTS:
        for mark in layout.marks:
            if mark in row:
                return layout
    return None


def _unknown(row: dict[str, Any]) -> str:
    marks = [mark for layout in _LAYOUTS for mark in layout.marks]
    hint = next((h for k in row if (h := near_miss(k, marks))), "")
    keys = ", ".join(map(repr, list(row)[:6])) or "none"
    return f"unknown; keys are {keys}{hint or '; expected for example prompt and response, or messages'}"


# ---- the parts of a row


def _pair(question: str, answer: str) -> list[Message]:
    return [Message("user", question), Message("assistant", answer)]


def _system(row: dict[str, Any], faults: Faults) -> list[Message]:
    text = _text(row, "system", faults, may_be_empty=True, default="")
    return [Message("system", text)] if text.strip() else []


def _history(row: dict[str, Any], faults: Faults) -> list[Message]:
    history = row.get("history")
    if history is None:
        return []
    if not isinstance(history, list):
        faults.append(("history", f"must be a list of [question, answer], not {_kind(history)}"))
        return []
    messages = []
    for i, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            size = f" of {len(turn)}" if isinstance(turn, list) else ""
            faults.append((f"history[{i}]", f"must be [question, answer], not {_kind(turn)}{size}"))
            continue
        texts = (_check_text(text, f"history[{i}][{j}]", faults) for j, text in enumerate(turn))
        messages += _pair(*texts)
    return messages


def _turns(row: dict[str, Any], key: str, faults: Faults) -> list[Message]:
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        faults.append((key, "is empty" if turns == [] else f"must be a list of turns, not {_kind(turns)}"))
        return []
    messages = (_turn(turn, f"{key}[{i}]", faults) for i, turn in enumerate(turns))
    return [m for m in messages if m is not None]


def _turn(turn: Any, name: str, faults: Faults) -> Message | None:
    if not isinstance(turn, dict):
        faults.append((name, f"must be an object with role and content (or from and value), not {_kind(turn)}"))
        return None
    role_key, text_key = ("from", "value") if "from" in turn or "value" in turn else ("role", "content")
    if "weight" in turn or turn.get("tool_calls"):
        key = "weight" if "weight" in turn else "tool_calls"
        faults.append((f"{name}.{key}", "is not supported; every assistant turn is learnt as its text"))
    role = turn.get(role_key)
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        faults.append((f"{name}.{role_key}", f"must be one of {', '.join(_ROLES)}; found {role!r:.60}"))
    # An answer of a tool may be empty; a question or an answer may not.
    text = _text(turn, text_key, faults, may_be_empty=known in ("tool", "system"), prefix=f"{name}.")
    return None if known is None else Message(known, text)


def _text(
    row: dict[str, Any],
    key: str,
    faults: Faults,
    *,
    may_be_empty: bool = False,
    default: str | None = None,
    prefix: str = "",
) -> str:
    """A string of the row, checked; "" with a fault when there is none. null counts as missing."""
    if row.get(key) is None:
        if default is None:
            faults.append((prefix + key, "missing"))
        return default or ""
    return _check_text(row[key], prefix + key, faults, may_be_empty=may_be_empty)


def _check_text(value: Any, name: str, faults: Faults, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        faults.append((name, f"must be a string, not {_kind(value)}"))
        return ""
    if not value.strip() and not may_be_empty:
        faults.append((name, "is empty"))
    elif "\0" in value:
        faults.append((name, f"holds a NUL character (position {value.index(chr(0))})"))
    elif (at := _surrogate(value)) is not None:
        faults.append((name, f"holds half of a surrogate pair (U+{ord(value[at]):04X} at position {at})"))
    return value


def _surrogate(text: str) -> int | None:
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        return e.start
    return None


def _extras(row: dict[str, Any], faults: Faults) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    for key in _STRINGS:
        if row.get(key) is not None:
            extras[key] = _text(row, key, faults, may_be_empty=True).strip() or None
    for key in _LISTS:
        if (value := row.get(key)) is None:
            continue
        if not isinstance(value, list):
            faults.append((key, f"must be a list of strings, not {_kind(value)}"))
            value = None
        extras[key] = tuple(_check_text(v, f"{key}[{i}]", faults) for i, v in enumerate(value or []))
    return extras


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# ---- what must hold between the parts


def _num_listed(row: dict[str, Any], layout: _Layout) -> int:
    listed = row.get(layout.list_key)
    return len(listed) if isinstance(listed, list) else 0


def _check_order(messages: list[Message], key: str, offset: int, faults: Faults) -> None:
    """Turns must alternate and end with an answer. The first `offset` messages do not come from the list `key`."""
    before: str | None = None
    for i, message in enumerate(messages):
        if message.role not in _FOLLOWS[before]:
            place = f"after {before}" if before else "at the beginning"
            faults.append((f"{key}[{i - offset}]", f"roles out of order: {message.role} {place}"))
            return
        before = message.role
    if before != "assistant":
        faults.append((key, f"must end with an assistant turn, the answer to learn; it ends with {before}"))


def _check_facts(messages: list[Message], facts: tuple[str, ...], faults: Faults) -> None:
    answer = messages[-1].content if messages else ""
    for i, fact in enumerate(facts):
        if fact and fact not in answer:
            faults.append((f"facts[{i}]", f"{fact!r} does not stand in the answer"))
