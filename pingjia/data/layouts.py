"""The layouts of a row: which keys mean the question, the answer and what went before.

Recognised by their keys, row by row, without registration: prompt/response, alpaca, ShareGPT, OpenAI messages,
context/target. Not here: files and JSON (`rows.py`), lengths and duplicates (`check.py`), and what makes a tool or a
call (`chat/tools.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pingjia.chat.tools import Malformed, parse_tool_calls, read_call, read_tool
from pingjia.recipe import near_miss
from pingjia.types import Example, Message, ToolCall

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
    "function": "tool",
}
_CALL_ROLE = "function_call"  # its text is a call
_PLAIN_KEYS = frozenset(("role", "content", "from", "value"))
_OWN_KEYS = {
    "assistant": _PLAIN_KEYS | {"tool_calls", "function_call", "weight"},
    "tool": _PLAIN_KEYS | {"tool_call_id", "name", "weight"},
}
_FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_STRINGS = ("domain", "lang", "topic", "source", "reference", "augmented_from")
_LISTS = ("facts", "images")
_EXTRAS = (*_STRINGS, *_LISTS, "tools", "functions", "weight")


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
    tools = _tools(row, faults) if "tools" in row or "functions" in row else {}
    if not faults:
        offset = len(messages) - _num_listed(row, layout)
        _check_order(messages, layout.list_key, offset, faults)
        if layout.has_turns:
            _check_calls(messages, tools, layout.list_key, offset, faults)
    if "facts" in extras:
        _check_facts(messages, extras["facts"], faults)
    unread = [k for k in row if k not in _KNOWN[layout.name]]
    if layout.has_turns:
        unread += _unread_in_turns(row, layout.list_key)
    example = None if faults else Example(tuple(messages), where, tools=tuple(tools.values()), **extras)
    return Parsed(layout.name, example, faults, tuple(unread))


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
    has_turns: bool = False


_LAYOUTS = (
    _Layout("messages", ("messages",), ("messages",), _read_messages, "messages", True),
    _Layout("sharegpt", ("conversations",), ("conversations", "system"), _read_sharegpt, "conversations", True),
    _Layout("prompt", ("prompt", "response"), ("prompt", "response", "history", "system"), _read_prompt),
    _Layout("alpaca", ("instruction", "output"), ("instruction", "input", "output", "history", "system"), _read_alpaca),
    _Layout("context", ("context", "target"), ("context", "target"), _read_context),
)
LAYOUTS = tuple(layout.name for layout in _LAYOUTS)
_KNOWN = {layout.name: frozenset((*layout.keys, *_EXTRAS)) for layout in _LAYOUTS}


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
    role = turn.get(role_key)
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        faults.append((f"{name}.{role_key}", f"must be one of {', '.join(_ROLES)}; found {role!r:.60}"))
    is_plain = (len(turn) == 2 and text_key in turn) or _PLAIN_KEYS.issuperset(turn)
    if role == _CALL_ROLE or not is_plain:
        return _turn_with_more(turn, str(role), known, text_key, name, faults)
    text = _content(turn, text_key, known, name, faults)
    return None if known is None else Message(known, text)


def _content(turn: dict[str, Any], key: str, role: str | None, name: str, faults: Faults) -> str:
    """The text of a turn; its parts joined, when it is a list of text parts."""
    # An answer of a tool may be empty; a question or an answer may not.
    may_be_empty = role in ("tool", "system")
    value, name = turn.get(key), f"{name}.{key}"
    if isinstance(value, list):
        value = "".join([_part(part, f"{name}[{i}]", faults) for i, part in enumerate(value)])
    if value is None:
        faults.append((name, "missing"))
        return ""
    return _check_text(value, name, faults, may_be_empty=may_be_empty)


def _part(part: Any, name: str, faults: Faults) -> str:
    if not isinstance(part, dict):
        faults.append((name, f"must be an object with type and text, not {_kind(part)}"))
        return ""
    if part.get("type") != "text":
        faults.append(
            (f"{name}.type", f"must be 'text', the only kind of part that is read; found {part.get('type')!r:.40}")
        )
        return ""
    return _text(part, "text", faults, may_be_empty=True, prefix=f"{name}.")


# ---- turns with calls, results and weights


def _turn_with_more(
    turn: dict[str, Any], role: str, known: str | None, text_key: str, name: str, faults: Faults
) -> Message | None:
    if role == _CALL_ROLE:
        text, calls = _call_text(turn, text_key, name, faults)
    else:
        calls = _calls(turn, known, name, faults)
        is_silent = bool(calls) and not turn.get(text_key)  # a call needs no words
        text = "" if is_silent else _content(turn, text_key, known, name, faults)
    learn = _learn(turn, known, name, faults)
    if known is None:
        return None
    if known != "tool":
        return Message(known, text, calls, learn=learn)
    tool, call_id = (_link(turn, key, name, faults) for key in ("name", "tool_call_id"))
    return Message(known, text, name=tool, tool_call_id=call_id)


def _link(turn: dict[str, Any], key: str, name: str, faults: Faults) -> str:
    return _text(turn, key, faults, may_be_empty=True, default="", prefix=f"{name}.")


def _call_text(turn: dict[str, Any], key: str, name: str, faults: Faults) -> tuple[str, tuple[ToolCall, ...]]:
    """A turn of the role function_call: JSON text of a call or of a list of calls, or the JSON itself."""
    value = turn.get(key)
    if isinstance(value, dict | list):
        listed = value if isinstance(value, list) else [value]
        return "", _read_calls(listed, f"{name}.{key}", faults)
    text, calls = parse_tool_calls(_text(turn, key, faults, prefix=f"{name}."))
    if not calls and isinstance(value, str) and value.strip():
        form = '{"name": "...", "arguments": {...}}'
        faults.append((f"{name}.{key}", f"must be a call, {form}, or a list of calls; found {value!r:.60}"))
    return text, calls


def _calls(turn: dict[str, Any], role: str | None, name: str, faults: Faults) -> tuple[ToolCall, ...]:
    """`tool_calls` of a turn, or the older `function_call`, which is one call."""
    given = [key for key in ("tool_calls", "function_call") if turn.get(key)]
    if not given:
        return ()
    key, value = given[0], turn[given[0]]
    if len(given) == 2:
        faults.append((f"{name}.function_call", "says the same as tool_calls in an older form; leave one out"))
    elif role not in (None, "assistant"):
        faults.append((f"{name}.{key}", f"belongs to an assistant turn, not to one of {role}"))
    elif key == "function_call":
        return _read_calls([value], f"{name}.{key}", faults)
    elif isinstance(value, list):
        return _read_calls(value, f"{name}.{key}", faults)
    else:
        faults.append((f"{name}.{key}", f"must be a list of calls, not {_kind(value)}"))
    return ()


def _read_calls(values: list[Any], name: str, faults: Faults) -> tuple[ToolCall, ...]:
    calls = []
    for i, value in enumerate(values):
        try:
            calls.append(read_call(value))
        except Malformed as e:
            faults.append((f"{name}[{i}]{e.field and f'.{e.field}'}", e.reason))
    return tuple(calls)


def _learn(turn: dict[str, Any], role: str | None, name: str, faults: Faults) -> bool:
    """Whether `weight` lets an assistant's turn be learnt: 1, as without it, or 0."""
    weight = turn.get("weight")
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        faults.append(
            (f"{name}.weight", f"must be 0 or 1, not {weight!r:.40}; a row can have a weight between, as its own key")
        )
    elif role not in (None, "assistant"):
        faults.append(
            (f"{name}.weight", f"belongs to an assistant turn, not to one of {role}; no other is ever learnt")
        )
    return bool(weight)


def _tools(row: dict[str, Any], faults: Faults) -> dict[str, str]:
    """Tools by name, as canonical JSON text. `functions` is the older name of the key."""
    value = row.get("tools")
    if value is None and row.get("functions") is None:
        return {}
    key, value = ("tools", value) if value is not None else ("functions", row["functions"])
    if isinstance(value, str):
        value = _decoded(value, key, faults)
    if not isinstance(value, list):
        faults.append((key, f"must be a list of tools, or its JSON text, not {_kind(value)}"))
        return {}
    tools: dict[str, str] = {}
    for i, tool in enumerate(value):
        try:
            text = read_tool(tool)
        except Malformed as e:
            faults.append((f"{key}[{i}]{e.field and f'.{e.field}'}", e.reason))
            continue
        name = (tool.get("function") or tool)["name"]
        if name in tools:
            faults.append((f"{key}[{i}]", f"is the second tool called {name!r}"))
        tools[name] = text
    return tools


def _decoded(text: str, key: str, faults: Faults) -> Any:
    """JSON text of a list. No text is an empty list, as some data sets write it."""
    try:
        return json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as e:
        faults.append((key, f"is not JSON: {e}"))
        return []


# ---- texts and extras


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
    """What the row says beside its conversation; keys that it has not are left to their defaults."""
    extras: dict[str, Any] = {}
    for key in _STRINGS:
        if row.get(key) is not None:
            extras[key] = _text(row, key, faults, may_be_empty=True).strip() or None
    for key in _LISTS:
        if row.get(key) is not None:
            extras[key] = tuple(_strings(row[key], key, faults))
    if row.get("weight") is not None:
        extras["weight"] = _weight(row["weight"], faults)
    return extras


def _strings(value: Any, key: str, faults: Faults) -> Iterator[str]:
    if not isinstance(value, list):
        faults.append((key, f"must be a list of strings, not {_kind(value)}"))
        return
    for i, text in enumerate(value):
        yield _check_text(text, f"{key}[{i}]", faults)


def _weight(value: Any, faults: Faults) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        faults.append(("weight", f"must be a number, 0 or more, not {value!r:.40}"))
        return 1.0
    return float(value)


def _unread_in_turns(row: dict[str, Any], key: str) -> list[str]:
    turns = row[key] if isinstance(row[key], list) else []
    # A turn of two keys has nothing more, or lacks a role or a text, which is a fault.
    more = [turn for turn in turns if isinstance(turn, dict) and len(turn) > 2]
    return [f"{key}[].{k}" for turn in more for k in turn if k not in _own_keys(turn)]


def _own_keys(turn: dict[str, Any]) -> frozenset[str]:
    role = turn.get("from", turn.get("role"))
    return _OWN_KEYS.get(_ROLES.get(role, "") if isinstance(role, str) else "", _PLAIN_KEYS)


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
    elif not messages[-1].learn:
        at = f"{key}[{len(messages) - 1 - offset}].weight"
        faults.append((at, "is 0 on the last turn; leave out what follows the last answer to learn"))


def _check_calls(messages: list[Message], tools: dict[str, str], key: str, offset: int, faults: Faults) -> None:
    """A call must name a tool of the row, if it lists any; a result must answer a call of the turn before."""
    calls: tuple[ToolCall, ...] = ()
    for i, message in enumerate(messages):
        if message.role != "tool":
            calls = message.tool_calls
            for j, call in enumerate(calls):
                if tools and call.name not in tools:
                    reason = f"calls {call.name!r}, which is not among the row's tools: {', '.join(tools)}"
                    faults.append((f"{key}[{i - offset}].tool_calls[{j}]", reason))
        elif message.tool_call_id and message.tool_call_id not in {call.id for call in calls}:
            found = ", ".join(repr(call.id) for call in calls) or "none"
            reason = f"{message.tool_call_id!r} is no call of the assistant's turn before, which has {found}"
            faults.append((f"{key}[{i - offset}].tool_call_id", reason))


def _check_facts(messages: list[Message], facts: tuple[str, ...], faults: Faults) -> None:
    answer = messages[-1].text if messages else ""
    for i, fact in enumerate(facts):
        if fact and fact not in answer:
            faults.append((f"facts[{i}]", f"{fact!r} does not stand in the answer"))
