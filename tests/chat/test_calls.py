"""Calls of tools as text: what is written is found again, and garbage is text."""

import json
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pingjia.chat.calls import canonical, parse_tool_calls, python_call
from pingjia.types import Message, ToolCall

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["f", "get_weather", "天气", "a.b-c", 'q"uote', "forget_weather"])
CALLS = st.builds(
    ToolCall, NAMES, st.dictionaries(st.text(max_size=8) | st.just("class"), JSON, max_size=3).map(canonical)
)
SOME = st.lists(CALLS, min_size=1, max_size=3).map(tuple)
TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from('{}[]"\n ,;:`')).filter(
    lambda t: t == t.strip() and parse_tool_calls(t) == (t, ())
)

F = ToolCall("f", '{"a": 1}')
G = ToolCall("g", "{}")


# ---- what is written is found again


@given(TEXTS, SOME)
@example("", (F,))
@example("好的。\n{", (F, G))
def test_the_plain_form(text: str, calls: tuple[ToolCall, ...]) -> None:
    written = Message("assistant", text, calls).text
    assert parse_tool_calls(written) == (text, calls)
    assert parse_tool_calls(written + "\n") == (text, calls)


@given(TEXTS, SOME)
def test_tagged_calls(text: str, calls: tuple[ToolCall, ...]) -> None:
    assume("<tool_call>" not in text and not any("tool_call>" in call.text for call in calls))
    blocks = [f"<tool_call>\n{call.text}\n</tool_call>" for call in calls]
    assert parse_tool_calls("\n".join(filter(None, [text, *blocks]))) == (text, calls)


@given(
    SOME, st.sampled_from(["arguments", "parameters"]), st.sampled_from(["; ", "\n", ";"]), st.sampled_from([None, 2])
)
def test_answers_that_are_json(calls: tuple[ToolCall, ...], key: str, between: str, indent: int | None) -> None:
    values = [{"name": call.name, key: json.loads(call.arguments)} for call in calls]
    for head in ("", "<|python_tag|>", "[TOOL_CALLS] "):
        objects = between.join(json.dumps(value, indent=indent) for value in values)
        assert parse_tool_calls(head + objects) == ("", calls)
        assert parse_tool_calls(head + json.dumps(values, indent=indent)) == ("", calls)


@given(TEXTS, SOME)
def test_calls_in_python(text: str, calls: tuple[ToolCall, ...]) -> None:
    """As ChatGLM3 writes them, and as its tokenizer decodes them: role tokens between them give no text."""
    assume("```" not in text)
    parts = [f"{call.name}\n {python_call(call)}" for call in calls]
    assert parse_tool_calls(" ".join(filter(None, [text, *parts]))) == (text, calls)


def test_python_is_as_published() -> None:
    call = ToolCall("get_current_weather", '{"location": "beijing", "unit": "celsius"}')
    assert python_call(call) == '```python\ntool_call(location="beijing", unit="celsius")\n```'
    assert python_call(ToolCall("f", '{"a": [true, null], "b c": {"x": "\\n"}}')) == (
        '```python\ntool_call(a=[True, None], **{"b c": {"x": "\\n"}})\n```'
    )


@given(TEXTS, CALLS)
def test_the_name_above_its_arguments(text: str, call: ToolCall) -> None:
    """As GLM-4 writes them. Only names that are known: a word above JSON may be an ordinary answer."""
    assume(not any(name in text for name in (call.name, "f")))
    written = f"{text}{call.name}\n{call.arguments}"
    assert parse_tool_calls(written, [call.name, "zzz"]) == (text, (call,))
    assert parse_tool_calls(written)[1] == ()


# ---- what is no call


@pytest.mark.parametrize(
    "text",
    [
        "",
        "你好",
        "{}",
        '{"name": "f"}',
        '{"name": "f", "arguments": 3}',
        '{"name": "f", "arguments": "no"}',
        '{"name": "f", "arguments": "[]"}',
        '{"name": "", "arguments": {}}',
        '{"name": "two words", "arguments": {}}',
        '{"name": 3, "arguments": {}}',
        '{"name": "f", "arguments": {}, "price": 3}',
        '{"name": "f", "arguments": {}, "type": "web"}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": "\\ud83d"}}',
        '{"name": "f", "arguments": {}',
        '[{"name": "f", "arguments": {}}, 3]',
        '{"name": "f", "arguments": {}}\nThat is how you call it.',
        '{"name": "f", "arguments": {}} and so on',
        "<tool_call>",
        '<tool_call>{"name": "f"}</tool_call>',
        "f\n```python\ntool_call(g())\n```",
        "f\n```python\ntool_call(1)\n```",
        "f\n```python\ntool_call(**3)\n```",
        "f\n```python\ntool_call(a={1})\n```",
        "f\n```python\nprint(a=1)\n```",
        "f\n```python\ntool_call(a=1",
        "```python\ntool_call(a=1)\n```",
        "text ```python\ntool_call(a=1)\n```",
        "f\n```python\n" + "(" * 5000 + ")" * 5000 + "\n```",
        "[" * 100_000,
        '{"name": "f", "arguments": ' + "[" * 100_000,
        "好" * 200_000,
        "<tool_call>" * 20_000,
        "```python\n" * 20_000 + "\n```",
    ],
)
def test_what_is_no_whole_call_stays_text(text: str) -> None:
    assert parse_tool_calls(text, ["f"]) == (text, ())


PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', "{", "}", "[", "]", '"', "\n", ";", "f", "```"]  # noqa: RUF005
    + ["```python\n", "tool_call(", ")", "a=1", "<|python_tag|>", "[TOOL_CALLS]", "\\", "\0", "\ud83d", "**"]
)


@given(st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join), st.sets(st.text(max_size=3), max_size=2))
def test_garbage_never_raises(text: str, names: set[str]) -> None:
    rest, calls = parse_tool_calls(text, names)
    assert calls or rest == text
    for call in calls:
        assert isinstance(json.loads(call.arguments), dict)
        assert call.text.encode()


def test_a_call_that_is_cut_off_in_its_tag_is_found_when_it_is_whole() -> None:
    """The closing tag may be a stop token."""
    assert parse_tool_calls('Sure.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}') == ("Sure.", (F,))


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}', '{"a":1}'])
def test_arguments_may_be_an_object_or_its_text(arguments: Any) -> None:
    assert parse_tool_calls(json.dumps({"id": "c1", "name": "f", "arguments": arguments})) == ("", (F,))


def test_calls_whose_arguments_have_tags_of_their_own() -> None:
    qwen = (
        "我查一下。\n<tool_call>\n<function=get_weather>\n<parameter=city>\n北京\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
    )
    wanted = ToolCall("get_weather", canonical({"city": "北京", "days": 3}))
    assert parse_tool_calls(qwen) == ("我查一下。", (wanted,))
    glm = (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>北京</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
    )
    assert parse_tool_calls(glm) == ("", (wanted,))
    two = f"{glm}\n{glm}"
    assert parse_tool_calls(two)[1] == (wanted, wanted)
    assert parse_tool_calls("<tool_call>get_time</tool_call>", {"get_time"}) == ("", (ToolCall("get_time", "{}"),))


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>get_time</tool_call>",  # no known tool: a word
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>北京</arg_value>\n<arg_key>da",
        "<tool_call><function=f><parameter=a>1</parameter>",
        "<tool_call><function=f>some words</function></tool_call>",
    ],
)
def test_tags_that_are_no_whole_call_stay_text(text: str) -> None:
    assert parse_tool_calls(text) == (text, ())
