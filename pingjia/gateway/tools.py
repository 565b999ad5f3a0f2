"""Tools in a chat: what a body says of them, and the calls in an answer while it is still coming.

How calls are written in an answer is known in `pingjia.chat.calls`, what a template makes of tools in
`pingjia.chat.dialect`; the model is never asked to say more than text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pingjia.chat.tools import as_tools, parse_tool_calls
from pingjia.errors import RequestError
from pingjia.gateway.bodies import ChatBody
from pingjia.types import Grammar, ToolCall

_MAX_TOOLS = 128
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_INVALID = "invalid_value"
_TAG = "<tool_call>"


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of one request. `listed`: JSON text of each that the model is shown.

    names: of the calls that are taken as calls. at_most: how many of them; None for no limit. grammar: what an answer
    must be when a call is demanded.
    """

    listed: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    at_most: int | None = None
    grammar: Grammar | None = None

    def read(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """(text, calls) of a whole answer. A call of something that was not offered is text."""
        if not self.names:
            return text, ()
        rest, calls = parse_tool_calls(text, self.names)
        if not calls or any(call.name not in self.names for call in calls):
            return text, ()
        return rest, tuple(ToolCall(c.name, c.arguments, new_id()) for c in calls[: self.at_most])


NO_TOOLS = Toolbox()


def new_id() -> str:
    """An id for a call: the forms that models write have none."""
    return f"call_{uuid.uuid4().hex[:24]}"


def toolbox_of(body: ChatBody) -> Toolbox:
    """What the body says of tools. Raises RequestError naming the field."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice: there are no tools to choose from", param="tool_choice", code=_INVALID)
        return NO_TOOLS
    if len(body.tools) > _MAX_TOOLS:
        raise RequestError(f"tools: {len(body.tools)}; at most {_MAX_TOOLS} are read", param="tools", code=_INVALID)
    tools = checked(body.tools)
    if choice == "none":
        return NO_TOOLS
    listed = shown(tools)
    names = tuple(tool["function"]["name"] for tool in tools)
    at_most = 1 if body.parallel_tool_calls is False else None
    if choice in (None, "auto"):
        return Toolbox(listed, names, at_most)
    wanted = _wanted(choice, tools)
    return Toolbox(listed, tuple(tool["function"]["name"] for tool in wanted), 1, _grammar(wanted))


def checked(tools: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The tools in their full form. Raises RequestError for one that is none, or a name that is there twice."""
    try:
        found = as_tools(tools)
    except RequestError as e:
        raise RequestError(str(e), param="tools", code=_INVALID) from None
    names = [tool["function"]["name"] for tool in found]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise RequestError(f"tools: two are called {twice[:80]!r}", param="tools", code=_INVALID)
    return found


def shown(tools: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the model is shown of each: its JSON text."""
    return tuple(json.dumps(tool, ensure_ascii=False) for tool in tools)


def _wanted(choice: Any, tools: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The tools one of which must be called."""
    if choice == "required":
        return tools
    name = choice.function.name
    found = [tool for tool in tools if tool["function"]["name"] == name]
    if not found:
        raise RequestError(f"tool_choice: no tool is called {name[:80]!r}", param="tool_choice", code=_INVALID)
    return found


def _grammar(tools: Sequence[dict[str, Any]]) -> Grammar:
    """An answer that is one call, in the form that `parse_tool_calls` reads from every model."""
    functions = [tool["function"] for tool in tools]
    if len(functions) == 1:
        return Grammar.schema(_call_schema(functions[0], "#"), "tool_choice")
    calls = [_call_schema(function, f"#/anyOf/{i}") for i, function in enumerate(functions)]
    return Grammar.schema({"anyOf": calls}, "tool_choice")


def _call_schema(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The schema of a call, to stand at `place` of the whole document."""
    arguments = _moved(function.get("parameters") or _ANY_OBJECT, f"{place}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself hold where it stands now."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    ref = schema.get("$ref")
    moved = {key: _moved(value, place) for key, value in schema.items()}
    return moved | {"$ref": place + ref[1:]} if isinstance(ref, str) and ref.startswith("#") else moved


class CallReader:
    """The text of one answer in, out comes what is certainly not part of a call. One per choice of a stream.

    Calls stand at the end of an answer or are all of it, so that what may begin one is held back until the end.
    """

    def __init__(self, toolbox: Toolbox) -> None:
        self._toolbox = toolbox
        self._begins = _beginnings(toolbox.names)
        self._text = ""
        self._num_out = 0
        self._is_held = False

    def feed(self, text: str) -> str:
        """What can be shown now; may be empty."""
        self._text += text
        if self._is_held:
            return ""
        found = self._begins.search(self._text, self._num_out)
        if found is None:
            return self._out(len(self._text))
        # What reaches the end of the text so far may still turn out to be something else.
        self._is_held = found["sure"] is not None
        return self._out(found.start())

    def end(self) -> tuple[str, tuple[ToolCall, ...]]:
        """The rest of the text, and the calls. Once, after the last `feed`."""
        rest, calls = self._toolbox.read(self._text)
        shown = self._text[: self._num_out]
        # Around calls white space is taken away, which may have been shown.
        left = rest[len(shown) :] if rest.startswith(shown) else rest[len(shown.lstrip()) :]
        return left, calls

    def _out(self, end: int) -> str:
        text, self._num_out = self._text[self._num_out : end], end
        return text


def _beginnings(names: Sequence[str]) -> re.Pattern[str]:
    """Where a call may begin: JSON at the beginning of a line, a tag, a tool's name at the end of a line.

    Matches the white space before it too. `sure`: more text cannot change that it looks like a call.
    """
    known = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    halves = {text[:i] for text in (*names, _TAG) for i in range(1, len(text))}
    half = "|".join(map(re.escape, sorted(halves, key=len, reverse=True)))
    first = r"\A\s*(?:\[|<\|python_tag\|>)"
    sure = rf"{first}|(?:(?<![^\n])[ \t]*|\s*\n\s*)\{{|\s*{_TAG}|\s*(?:{known})[ \t]*\n"
    return re.compile(rf"(?P<sure>{sure})|\A\s*<[|a-z_]*\Z|\s*(?:{known})[ \t]*\Z|\s*(?:{half})\Z|\s+\Z")
