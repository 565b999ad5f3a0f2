"""Tools in a conversation: what a row or a request may say of them, and the plain form for models without one.

The plain form: the tools are listed in the system message; a call is one line of JSON in the assistant's turn; a result
is the text of the tool's turn, or, where a model knows no such role, a user's turn that says so.

Not here: calls in an answer (`calls.py`), and what a template makes of tools by itself (`dialect.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pingjia.chat.calls import canonical, is_name, parse_tool_calls
from pingjia.errors import RequestError
from pingjia.types import Message, ToolCall

__all__ = [
    "Malformed",
    "as_row",
    "as_tools",
    "linked",
    "parse_tool_calls",
    "plain",
    "read_call",
    "read_tool",
    "uses_tools",
]

_LIST_HEAD = "# 工具 / Tools"
_CALL_HEAD = "# 调用 / Call"
_RESULT_HEAD = "# 结果 / Result"
_CALL_FORM = '{"name": "...", "arguments": {...}}'


class Malformed(ValueError):
    """A tool or a call that cannot be read. `field` is relative to it, "" for the whole."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field = field
        self.reason = reason


# ---- reading


def read_tool(value: Any) -> str:
    """Canonical JSON text of a tool: {"type": "function", "function": {"name", ...}} on one line, keys in their order.

    A bare function is taken too. Raises Malformed.
    """
    function, prefix = _unwrapped(value)
    _check_name(function, prefix)
    if not isinstance(function.get("description"), str | None):
        raise Malformed(f"{prefix}description", "must be a string")
    if not isinstance(function.get("parameters"), dict | None):
        raise Malformed(f"{prefix}parameters", "must be an object, a JSON schema")
    return _text({"type": "function", "function": function}, prefix.removesuffix("."))


def read_call(value: Any) -> ToolCall:
    """A call as OpenAI has it, {"id", "type", "function": {"name", "arguments"}}, or bare {"name", "arguments"}.

    `arguments` may be an object or its JSON text; it becomes canonical JSON text. Raises Malformed.
    """
    function, prefix = _unwrapped(value)
    _check_name(function, prefix)
    arguments, field = function.get("arguments"), f"{prefix}arguments"
    if isinstance(arguments, str):
        arguments = _parsed(arguments, field)
    if not isinstance(arguments, dict):
        raise Malformed(field, "missing" if arguments is None else "must be an object, or the JSON text of one")
    call_id = value.get("id")
    if not isinstance(call_id, str | None):
        raise Malformed("id", "must be a string")
    return ToolCall(function["name"], _text(arguments, field), call_id or "")


def _unwrapped(value: Any) -> tuple[dict[str, Any], str]:
    """The function of a tool or a call, and what its fields are called in complaints."""
    if not isinstance(value, Mapping):
        raise Malformed("", "must be an object with a function")
    if value.get("type", "function") != "function":
        raise Malformed("type", f"must be 'function', not {value['type']!r:.40}")
    function = value.get("function")
    if function is None:
        return {k: v for k, v in value.items() if k != "type"}, ""
    if not isinstance(function, Mapping):
        raise Malformed("function", "must be an object with a name")
    return dict(function), "function."


def _check_name(function: Mapping[str, Any], prefix: str) -> None:
    name = function.get("name")
    if name is None:
        raise Malformed(f"{prefix}name", "missing")
    if not isinstance(name, str) or not is_name(name):
        raise Malformed(f"{prefix}name", f"must be a word without white space, not {name!r:.40}")


def _parsed(text: str, field: str) -> Any:
    """JSON text decoded. No text at all is no arguments, as some servers write it."""
    try:
        return json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as e:
        raise Malformed(field, f"is not JSON: {e}") from None


def _text(value: Any, field: str) -> str:
    try:
        text = canonical(value)
        text.encode()
    except UnicodeEncodeError as e:
        raise Malformed(field, f"holds half of a surrogate pair (U+{ord(e.object[e.start]):04X})") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise Malformed(field, f"cannot be written as JSON: {e}") from None
    return text


def as_tools(tools: Sequence[str | Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Tools, each an object or its JSON text, as {"type": "function", "function": ...}.

    Raises RequestError (param "tools") naming the first that is none.
    """
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise RequestError(f"tools must be a list, not {type(tools).__name__}", param="tools")
    return tuple(_as_tool(tool, i) for i, tool in enumerate(tools))


def _as_tool(tool: str | Mapping[str, Any], index: int) -> dict[str, Any]:
    try:
        value = _parsed(tool, "") if isinstance(tool, str) else tool
        found: dict[str, Any] = json.loads(read_tool(value))
    except Malformed as e:
        where = f"tools[{index}]" + (f".{e.field}" if e.field else "")
        raise RequestError(f"{where}: {e.reason}", param="tools") from None
    return found


def as_row(message: Message) -> dict[str, Any]:
    """A message as OpenAI has it; `as_messages` makes an equal one of it."""
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        row["tool_calls"] = [_call_row(call) for call in message.tool_calls]
    row |= {k: v for k, v in (("name", message.name), ("tool_call_id", message.tool_call_id)) if v}
    return row


def _call_row(call: ToolCall) -> dict[str, Any]:
    row = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    return {"id": call.id, **row} if call.id else row


# ---- what belongs together


def uses_tools(messages: Sequence[Message]) -> bool:
    return any(m.role == "tool" or m.tool_calls for m in messages)


def linked(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Every call with an id, every result with the name and id of its call, and results in the order of their calls.

    Most models see no ids and tell results apart by their order. A result without an id belongs to the first call that
    has none yet. Ids that are missing are counted up: the start of a conversation never depends on its end.
    """
    out: list[Message] = []
    open_calls: list[ToolCall] = []
    results: list[Message] = []
    num_calls = 0
    for message in (*messages, None):
        if message is not None and message.role == "tool":
            results.append(message)
            continue
        out += _in_order(results, open_calls)
        results, open_calls = [], []
        if message is not None:
            open_calls = [replace(c, id=c.id or f"{num_calls + i:09d}") for i, c in enumerate(message.tool_calls)]
            num_calls += len(open_calls)
            out.append(replace(message, tool_calls=tuple(open_calls)) if open_calls else message)
    return tuple(out)


def _in_order(results: Sequence[Message], calls: Sequence[ToolCall]) -> list[Message]:
    number = {call.id: i for i, call in enumerate(calls)}
    free = iter(sorted(set(range(len(calls))) - {number[r.tool_call_id] for r in results if r.tool_call_id in number}))
    placed = [(number.get(r.tool_call_id) if r.tool_call_id else next(free, None), r) for r in results]
    return [_named(r, calls[at]) if at is not None else r for at, r in sorted(placed, key=_place)]


def _place(placed: tuple[int | None, Message]) -> float:
    return float("inf") if placed[0] is None else placed[0]


def _named(result: Message, call: ToolCall) -> Message:
    return replace(result, name=result.name or call.name, tool_call_id=call.id)


# ---- the plain form


def plain(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, has_results: bool, has_system: bool = True
) -> tuple[Message, ...]:
    """A conversation with tools as one of texts alone.

    `has_results`: the model knows the role "tool"; without it the results of a turn become one turn of the user.
    `has_system`: the model knows the role "system"; without it the list of tools stands before the first question.
    """
    turns = [Message(m.role, m.text, name=m.name, learn=m.learn) for m in messages]
    turns = turns if has_results else list(_results_as_questions(turns))
    return tuple(_with_list(turns, tool_list(tools), has_system) if tools else turns)


def tool_list(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the system message says of tools: one line of JSON each, and the form of a call."""
    lines = [canonical(tool["function"]) for tool in tools]
    return "\n".join((_LIST_HEAD, *lines, _CALL_HEAD, _CALL_FORM))


def _with_list(turns: list[Message], listed: str, has_system: bool) -> list[Message]:
    at = 0 if has_system else next((i for i, m in enumerate(turns) if m.role == "user"), 0)
    role = "system" if has_system else "user"
    if at >= len(turns) or turns[at].role != role:
        return [*turns[:at], Message(role, listed), *turns[at:]]
    texts = (turns[at].content, listed) if has_system else (listed, turns[at].content)
    return [*turns[:at], replace(turns[at], content="\n\n".join(filter(None, texts))), *turns[at + 1 :]]


def _results_as_questions(turns: Sequence[Message]) -> Iterator[Message]:
    waiting: list[str] = []
    for turn in turns:
        if turn.role == "tool":
            waiting.append(f"{_RESULT_HEAD}{turn.name and f' ({turn.name})'}\n{turn.content}")
            continue
        if waiting:
            yield Message("user", "\n".join(waiting))
            waiting = []
        yield turn
    if waiting:
        yield Message("user", "\n".join(waiting))
