"""What a chat template itself makes of tools, calls and results, and a conversation spelt for it.

Templates differ in what they read: `tools` or a system message's `tools`, `tool_calls` with arguments as objects or as
text, or a call's name as `metadata`; the role "tool" or "observation". None of them says so. So it is found out, by
rendering one small conversation in each spelling and looking for what should then stand in the text.

Not here: the template (`template.py`) and the plain form for templates that know nothing of tools (`tools.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pingjia.chat.calls import canonical
from pingjia.errors import RequestError
from pingjia.types import Message, ToolCall

Row = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]
Render = Callable[[list[Row], bool, Tools | None], str]
"""The template itself: rows, add_generation_prompt and the variable `tools` in, text out. Raises RequestError when it
refuses."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a template wants tools spelt.

    tools: in its variable, or on the system message. calls: `tool_calls` with arguments as objects or as JSON text, or
    `metadata` (one message for each call: the name there, the arguments as content). Where either is "text", the
    template does not know it, and both are text. results: the role of a result, None when it knows none. system:
    whether it takes a system message.
    """

    tools: Literal["variable", "system", "text"] = "text"
    calls: Literal["object", "string", "metadata", "text"] = "text"
    results: str | None = "tool"
    system: bool = True

    @property
    def is_native(self) -> bool:
        return self.tools != "text" and self.calls != "text" and self.results is not None

    def rows(self, messages: Sequence[Message], tools: Tools) -> list[Row]:
        """The variable `messages` of the template."""
        rows = [row for m in messages for row in self._rows_of(m)]
        if not tools or self.tools != "system":
            return rows
        head, rest = (rows[0], rows[1:]) if rows and rows[0]["role"] == "system" else (_row("system", ""), rows)
        return [{**head, "tools": list(tools)}, *rest]

    def variable(self, tools: Tools) -> Tools | None:
        """The variable `tools` of the template."""
        return list(tools) if tools and self.tools == "variable" else None

    def _rows_of(self, message: Message) -> Iterator[Row]:
        if message.role == "tool" and self.results:
            links = {"name": message.name, "tool_call_id": message.tool_call_id}
            yield _row(self.results, message.content) | {k: v for k, v in links.items() if v and self.is_native}
        elif not message.tool_calls:
            yield _row(message.role, message.content)
        elif self.calls == "metadata":
            if message.content:
                yield _row(message.role, message.content)
            for call in message.tool_calls:
                yield {"role": message.role, "metadata": call.name, "content": call.arguments}
        else:
            calls = [self._call(call) for call in message.tool_calls]
            yield {"role": message.role, "content": message.content, "tool_calls": calls}

    def _call(self, call: ToolCall) -> Row:
        arguments = call.arguments if self.calls == "string" else json.loads(call.arguments)
        return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _row(role: str, content: str) -> Row:
    return {"role": role, "content": content}


# ---- finding out

_NAME, _KEY, _VALUE, _TEXT = "probe_tool", "probe_key", "probe_value", "probe text"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "probe",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "probe"}}},
    },
}
_QUESTION = Message("user", "?")
_CALL = Message("assistant", "", (ToolCall(_NAME, canonical({_KEY: _VALUE}), "000000000"),))
_RESULT = Message("tool", _TEXT, name=_NAME, tool_call_id="000000000")


def find_dialect(render: Render, num_specials: Callable[[str], int]) -> Dialect:
    """What `render` knows. `num_specials` counts the special tokens in a text."""
    system = _TEXT in _tried(render, Dialect(), [Message("system", _TEXT), _QUESTION])
    spelt = Dialect(tools=_tools_spelling(render), calls=_calls_spelling(render), system=system)
    native = replace(spelt, results=_role_of_results(render, num_specials, spelt))
    if native.is_native:
        return native
    return Dialect(results=_role_of_results(render, num_specials, Dialect()), system=system)


def _tried(
    render: Render, dialect: Dialect, messages: Sequence[Message], tools: Tools = (), *, prompt: bool = False
) -> str:
    """The text of a conversation; empty when the template refuses it."""
    try:
        return render(dialect.rows(messages, tools), prompt, dialect.variable(tools))
    except RequestError:
        return ""


def _tools_spelling(render: Render) -> Literal["variable", "system", "text"]:
    for spelling in ("variable", "system"):
        if _NAME in _tried(render, Dialect(tools=spelling), [_QUESTION], [_TOOL]):
            return spelling
    return "text"


def _calls_spelling(render: Render) -> Literal["object", "string", "metadata", "text"]:
    for spelling in ("object", "string", "metadata"):
        if _shows_call(_tried(render, Dialect(calls=spelling), [_QUESTION, _CALL, _RESULT])):
            return spelling
        if _shows_call(_tried(render, Dialect(calls=spelling, results="observation"), [_QUESTION, _CALL, _RESULT])):
            return spelling
    return "text"


def _shows_call(text: str) -> bool:
    """Whether the call stands there; not as Python's own print of a dict, nor as JSON inside a JSON string."""
    is_garbled = f"'{_KEY}'" in text or f'\\"{_KEY}' in text
    return all(part in text for part in (_NAME, _KEY, _VALUE)) and not is_garbled


def _role_of_results(render: Render, num_specials: Callable[[str], int], dialect: Dialect) -> str | None:
    """The role that a result is given in, if the template has one.

    A role it does not know may be refused, left out, or take the form of another role. One whose header is a special
    token of its own is known better than one that is only written out. And some know it only beside their own form of
    calls: without that, the prompt after a result is not what stands before its answer.
    """
    ok = Message("assistant", "ok")
    before = [_QUESTION, ok if dialect.calls == "text" else _CALL, _RESULT]

    def text_of(role: str) -> str:
        spelt = replace(dialect, results=role)
        text = _tried(render, spelt, before)
        is_kept = dialect.calls != "text" or _tried(render, spelt, [*before, ok]).startswith(
            _tried(render, spelt, before, prompt=True)
        )
        return text if _TEXT in text and is_kept else ""

    others = {text_of(role) for role in ("user", "assistant", "system")}
    known = [role for role in ("tool", "observation") if text_of(role) and text_of(role) not in others]
    return max(known, key=lambda role: num_specials(text_of(role)), default=None)
