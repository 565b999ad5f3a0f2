"""Calls of tools as models write them: JSON, and the Python of ChatGLM3.

Here: one call as text, and finding the calls in an answer. Not here: what a request or a row may hold (`tools.py`), and
which form a model was taught (`dialect.py`, `chatglm.py`).
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from pingjia.types import ToolCall

Found = tuple[str, tuple[ToolCall, ...]]
"""What is left of an answer without its calls, and the calls."""

_CALL_KEYS = frozenset(("name", "arguments", "parameters", "id", "type"))
_TAG = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>)?\s*", re.DOTALL)  # Qwen3-Coder
_PARAMETER = re.compile(r"\s*<parameter=([^>]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_PLAIN_NAME = re.compile(r"\s*([^<\s]+)[ \t]*\n?(.*)", re.DOTALL)  # GLM-4.5
_KEY_VALUE = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_HEADS = ("<|python_tag|>", "[TOOL_CALLS]")  # before the JSON of Llama 3 and Mistral, where it is decoded as text
_FENCE, _FENCE_END = "```python\n", "\n```"
_DECODER = json.JSONDecoder()
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def parse_tool_calls(text: str, names: Collection[str] = ()) -> Found:
    """(text, calls) of an answer: what is left of it without its calls, and the calls in order.

    Read are: lines of JSON {"name", "arguments"} at the end (the plain form of this house); an answer that is nothing
    but such objects, or a list of them, however they are broken into lines, separated by white space or semicolons,
    with "arguments" or "parameters" (Llama 3); <tool_call>JSON</tool_call> (Qwen), with tags inside instead of JSON
    (Qwen3-Coder, GLM-4.5; a value that is JSON is read as that, every other one as text); a name and then
    ```python tool_call(...)``` (ChatGLM3); and a line that ends with one of `names`, then a JSON object (GLM-4).

    Never raises. What is no whole call stays text, and an answer without calls comes back as it is. Calls have no id:
    these forms do not write one.
    """
    readers: tuple[Callable[[str], Found | None], ...] = (
        lambda answer: _tagged(answer, names),
        _whole,
        _lines,
        _python,
        lambda answer: _headed(answer, names),
    )
    return next((found for read in readers if (found := read(text))), (text, ()))


# ---- writing


def canonical(value: Any) -> str:
    """JSON on one line, as `tojson` in chat templates writes it. Raises ValueError for NaN and infinity."""
    return _ENCODER.encode(value)


def is_name(text: str) -> bool:
    """Whether a tool may be called so. A name of several words could not be told from the text around it."""
    return text.split() == [text]


def python_call(call: ToolCall) -> str:
    """A call as ChatGLM3 was taught to write it, without its name, which stands in the line of the role."""
    parts = (_argument(name, value) for name, value in json.loads(call.arguments).items())
    return f"{_FENCE}tool_call({', '.join(parts)}){_FENCE_END}"


def _argument(name: str, value: Any) -> str:
    return f"{name}={_python_literal(value)}" if _is_parameter(name) else f"**{_python_literal({name: value})}"


def _is_parameter(name: str) -> bool:
    # Python reads identifiers in NFKC: a full-width name would come back as another one.
    return name.isidentifier() and name.isascii() and not keyword.iskeyword(name)


def _python_literal(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{canonical(k)}: {_python_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_python_literal, value)) + "]"
    return canonical(value) if isinstance(value, str) else repr(value)


# ---- JSON


def _tagged(text: str, names: Collection[str]) -> Found | None:
    """<tool_call> blocks; None unless each holds one call."""
    calls = [_call_of(m[1]) or _call_in_tags(m, names) for m in _TAG.finditer(text)]
    if not calls or None in calls:
        return None
    return _TAG.sub("", text).strip(), tuple(call for call in calls if call)


def _call_in_tags(block: re.Match[str], names: Collection[str]) -> ToolCall | None:
    """A call whose arguments have tags of their own. Cut off it could pass for a whole one: its end must be there."""
    if not block[0].endswith("</tool_call>"):
        return None
    for head, argument in ((_FUNCTION, _PARAMETER), (_PLAIN_NAME, _KEY_VALUE)):
        found = head.fullmatch(block[1])
        if not found or argument.sub("", found[2]).strip():
            continue
        arguments = {key.strip(): _value(value) for key, value in argument.findall(found[2])}
        if arguments or head is _FUNCTION or found[1] in names:  # a lone word is a call only of a known tool
            return _made(found[1], arguments)
    return None


def _value(text: str) -> Any:
    """What a tag holds: JSON where it is that, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _whole(text: str) -> Found | None:
    """An answer that is JSON and nothing else."""
    bare = text.strip()
    head = next((h for h in _HEADS if bare.startswith(h)), "")
    calls = _calls_of(bare[len(head) :])
    return ("", calls) if calls else None


def _calls_of(text: str) -> tuple[ToolCall, ...]:
    """The calls that `text` consists of; none when there is anything else in it."""
    values = list(_values(text))
    listed = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    calls = [_as_call(value) for value in listed]
    return tuple(call for call in calls if call) if None not in calls else ()


def _values(text: str) -> Iterator[Any]:
    """JSON values one after the other; a value that is none (None) ends them."""
    at = 0
    while at < len(text):
        if text[at].isspace() or (text[at] == ";" and at):
            at += 1
            continue
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            value, at = None, len(text)
        yield value


def _lines(text: str) -> Found | None:
    """Lines of JSON at the end, after text."""
    calls: list[ToolCall] = []
    rest = text.rstrip()
    while (call := _call_of(_last_line(rest))) is not None:
        calls.append(call)
        rest = rest[: len(rest) - len(_last_line(rest))].removesuffix("\n")
    return (rest, tuple(reversed(calls))) if calls else None


def _last_line(text: str) -> str:
    return text[text.rfind("\n") + 1 :]


def _call_of(text: str) -> ToolCall | None:
    bare = text.strip()
    if not bare.startswith("{"):
        return None
    try:
        return _as_call(json.loads(bare))
    except (ValueError, RecursionError):
        return None


def _as_call(value: Any) -> ToolCall | None:
    """A decoded JSON value as a call, if it is one and nothing else."""
    if not isinstance(value, dict) or not _CALL_KEYS.issuperset(value) or value.get("type", "function") != "function":
        return None
    return _made(value.get("name"), value.get("arguments", value.get("parameters")))


def _made(name: Any, arguments: Any) -> ToolCall | None:
    if not isinstance(name, str) or not is_name(name):
        return None
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        call = ToolCall(name, canonical(arguments))
        call.text.encode()  # JSON may spell half of a surrogate pair
    except (ValueError, TypeError, RecursionError):
        return None
    return call if isinstance(arguments, dict) else None


# ---- ChatGLM3 and GLM-4


def _python(text: str) -> Found | None:
    """name, a line break, ```python tool_call(...)```; several of them may end an answer."""
    calls: list[ToolCall] = []
    rest = text.rstrip()
    while (found := _last_python(rest)) is not None:
        rest, call = found
        calls.append(call)
    return (rest, tuple(reversed(calls))) if calls else None


def _last_python(text: str) -> tuple[str, ToolCall] | None:
    start = text.rfind(_FENCE)
    if start < 0 or not text.endswith(_FENCE_END):
        return None
    head, line_break, space = text[:start].rpartition("\n")
    arguments = _keywords(text[start + len(_FENCE) : -len(_FENCE_END)])
    words = head.rsplit(None, 1)
    if not line_break or space.strip() or not words or arguments is None:
        return None
    call = _made(words[-1], arguments)
    return None if call is None else (head.rstrip().removesuffix(words[-1]).rstrip(), call)


def _keywords(code: str) -> dict[str, Any] | None:
    """The arguments in `tool_call(a=1, **{"b c": 2})`. Only literals are read; nothing is run."""
    try:
        call = ast.parse(code.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "tool_call" or call.args:
            return None
        merged: dict[str, Any] = {}
        for part in call.keywords:
            value = ast.literal_eval(part.value)
            merged.update({part.arg: value} if part.arg else value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return merged


def _headed(text: str, names: Collection[str]) -> Found | None:
    """The name of a known tool at the end of a line, its arguments below; in front of it there may be text."""
    if not names or "{" not in text:
        return None
    known = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    m = re.search(rf"({known})[ \t]*\n\s*(\{{.*\}})\s*\Z", text, re.DOTALL)
    call = _made(m[1], m[2]) if m else None
    return None if m is None or call is None else (text[: m.start()].strip(), (call,))
