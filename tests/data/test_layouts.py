"""Every layout of a row, what is taken from it, and every way it can be wrong."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data.layouts import LAYOUTS, parse_row
from pingjia.types import Message, ToolCall

GOOD: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("prompt", {"prompt": "q", "response": "a"}, [("user", "q"), ("assistant", "a")]),
    (
        "prompt",
        {"prompt": "q", "response": "a", "history": [["h", "b"]], "system": "s"},
        [("system", "s"), ("user", "h"), ("assistant", "b"), ("user", "q"), ("assistant", "a")],
    ),
    ("prompt", {"prompt": "q", "response": "a", "history": [], "system": None}, [("user", "q"), ("assistant", "a")]),
    ("alpaca", {"instruction": "i", "input": "x", "output": "o"}, [("user", "i\nx"), ("assistant", "o")]),
    ("alpaca", {"instruction": "i", "input": "", "output": "o"}, [("user", "i"), ("assistant", "o")]),
    ("alpaca", {"instruction": "i", "output": "o"}, [("user", "i"), ("assistant", "o")]),
    ("alpaca", {"instruction": "", "input": "x", "output": "o"}, [("user", "x"), ("assistant", "o")]),
    (
        "alpaca",
        {"instruction": "i", "input": None, "output": "o", "history": [["h", "b"]]},
        [("user", "h"), ("assistant", "b"), ("user", "i"), ("assistant", "o")],
    ),
    ("context", {"context": "c", "target": "t"}, [("user", "c"), ("assistant", "t")]),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        [("system", "s"), ("user", "q"), ("assistant", "a")],
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": ""},
                {"from": "user", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": ""},
                {"from": "assistant", "value": "a"},
            ]
        },
        [("system", ""), ("user", "q"), ("assistant", ""), ("tool", ""), ("assistant", "a")],
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "2"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            ]
        },
        [("user", "q2"), ("assistant", "a")],
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        [("user", "q"), ("assistant", "a")],
    ),
]


@pytest.mark.parametrize(("layout", "row", "expected"), GOOD)
def test_good_rows(layout: str, row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    parsed = parse_row(row, "f:1")
    assert parsed.faults == []
    assert parsed.layout == layout
    assert parsed.example is not None
    assert [(m.role, m.content) for m in parsed.example.messages] == expected
    assert parsed.example.where == "f:1"
    assert parsed.unread == ()


def test_every_layout_is_tested() -> None:
    assert {layout for layout, _, _ in GOOD} == set(LAYOUTS)


def test_extras_are_taken() -> None:
    row = {
        "prompt": "q",
        "response": "36个月",
        "domain": "d",
        "lang": "zh",
        "topic": "t",
        "source": "s",
        "reference": "r",
        "facts": ["36个月"],
        "images": ["a.png"],
        "id": 7,
    }
    parsed = parse_row(row, "f:1")
    example = parsed.example
    assert example is not None
    assert (example.domain, example.lang, example.topic, example.source, example.reference) == tuple(
        ["d", "zh", "t", "s", "r"]
    )
    assert (example.facts, example.images) == (("36个月",), ("a.png",))
    assert parsed.unread == ("id",)


def _turns(*roles: str) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": "x"} for role in roles]}


def _with(**keys: Any) -> dict[str, Any]:
    return {"prompt": "q", "response": "a", **keys}


def _asked(*turns: dict[str, Any]) -> dict[str, Any]:
    ends = turns[-1]["role"] == "assistant"
    answer = {"role": "assistant", "content": "a"}
    return {"messages": [{"role": "user", "content": "q"}, *turns, *([] if ends else [answer])]}


def _calling(call: Any) -> dict[str, Any]:
    return _asked({"role": "assistant", "content": None, "tool_calls": [call]})


def _said(role: str, value: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "q"}, {"from": role, "value": value}]}


CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"城市":"北京", "n": 1.50}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


# ---- tools


def test_openai_tools_are_read_whole() -> None:
    row = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "y"}]},
            {"role": "tool", "tool_call_id": "x", "name": "f", "content": "1"},
            {"role": "tool", "tool_call_id": "y", "content": [{"type": "text", "text": "2"}]},
            {"role": "assistant", "content": "a"},
        ],
        "tools": [TOOL],
    }
    parsed = parse_row(row, "f:1")
    assert (parsed.faults, parsed.unread) == ([], ())
    example = parsed.example
    assert example is not None
    call = ToolCall("f", '{"城市": "北京", "n": 1.5}', "x")
    assert example.messages[2] == Message("assistant", "", (call, ToolCall("f", call.arguments, "y")))
    assert example.messages[3:5] == (
        Message("tool", "1", name="f", tool_call_id="x"),
        Message("tool", "2", tool_call_id="y"),
    )
    assert example.tools == (json.dumps(TOOL),)


def test_an_answer_may_be_a_call() -> None:
    example = parse_row({**_calling(CALL), "facts": ["北京"]}, "f:1").example
    assert example is not None
    assert example.response == '{"name": "f", "arguments": {"城市": "北京", "n": 1.5}}'


@pytest.mark.parametrize(
    "value",
    [
        '{"name": "f", "arguments": {"a": 1}}',
        '{"name": "f",\n "arguments": "{\\"a\\":1}"}',
        '[{"name": "f", "arguments": {"a": 1}}]',
        {"name": "f", "arguments": {"a": 1}},
        [{"name": "f", "arguments": {"a": 1}}],
    ],
)
def test_sharegpt_calls(value: Any) -> None:
    parsed = parse_row(_said("function_call", value), "f:1")
    assert parsed.faults == []
    assert parsed.example is not None
    assert parsed.example.messages[-1] == Message("assistant", "", (ToolCall("f", '{"a": 1}'),))


def test_the_older_names_of_openai() -> None:
    row = _asked(
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "1"},
    )
    parsed = parse_row({**row, "functions": [TOOL["function"]]}, "f:1")
    assert (parsed.faults, parsed.unread) == ([], ())
    assert parsed.example is not None
    assert parsed.example.messages[1:3] == (
        Message("assistant", "", (ToolCall("f", "{}"),)),
        Message("tool", "1", name="f"),
    )
    assert parsed.example.tools == (json.dumps(TOOL),)


@pytest.mark.parametrize("tools", ["", "[]", [], None])
@pytest.mark.parametrize("layout", [{"prompt": "q", "response": "a"}, {"instruction": "q", "output": "a"}])
def test_no_tools(tools: Any, layout: dict[str, Any]) -> None:
    parsed = parse_row({**layout, "tools": tools}, "f:1")
    assert (parsed.faults, parsed.unread) == ([], ())
    assert parsed.example == parse_row(layout, "f:1").example


@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], json.dumps([TOOL]), json.dumps([TOOL["function"]])])
def test_every_layout_may_list_tools(tools: Any) -> None:
    for row in ({"prompt": "q", "response": "a"}, {"instruction": "q", "output": "a"}, _turns("human", "gpt")):
        example = parse_row({**row, "tools": tools}, "f:1").example
        assert example is not None
        assert example.tools == (json.dumps(TOOL),)


def test_turns_of_weight_zero_are_read_and_not_learnt() -> None:
    row = _asked(
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "weight": 1},
    )
    parsed = parse_row(row, "f:1")
    assert (parsed.faults, parsed.unread) == ([], ())
    assert parsed.example is not None
    assert [m.learn for m in parsed.example.messages] == [True, False, True, True]


def test_weight_and_origin_of_a_row() -> None:
    example = parse_row(_with(weight=2, augmented_from="f:3"), "f:1").example
    assert example is not None
    assert (example.weight, example.augmented_from) == (2.0, "f:3")
    plain = parse_row(_with(weight=None, augmented_from=None), "f:1").example
    assert plain is not None
    assert (plain.weight, plain.augmented_from) == (1.0, None)


def test_keys_of_turns_that_mean_nothing_are_named() -> None:
    row = _asked({"role": "assistant", "content": "a", "reasoning_content": "hm", "name": "Bob"})
    parsed = parse_row(row, "f:1")
    assert parsed.example is not None
    assert parsed.unread == ("messages[].reasoning_content", "messages[].name")


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, "layout", "keys are none"),
    ({"promt": "q", "answer": "a"}, "layout", "did you mean prompt?"),
    ({"xyz": "long text"}, "layout", "keys are 'xyz'; expected"),
    ({"prompt": "q"}, "response", "missing"),
    ({"response": "a"}, "prompt", "missing"),
    ({"prompt": "", "response": "a"}, "prompt", "is empty"),
    ({"prompt": "q", "response": " \n\u3000"}, "response", "is empty"),
    ({"prompt": "q", "response": None}, "response", "missing"),
    ({"prompt": 5, "response": "a"}, "prompt", "must be a string, not a number"),
    ({"prompt": True, "response": "a"}, "prompt", "must be a string, not a boolean"),
    ({"prompt": "q", "response": ["a"]}, "response", "must be a string, not a list"),
    ({"prompt": "q", "response": {"a": 1}}, "response", "must be a string, not an object"),
    ({"prompt": "q\0", "response": "a"}, "prompt", "NUL character (position 1)"),
    ({"prompt": "q", "response": "a\ud83d"}, "response", "half of a surrogate pair (U+D83D at position 1)"),
    ({"prompt": "q", "response": "a", "history": "h"}, "history", "must be a list of [question, answer], not a string"),
    ({"prompt": "q", "response": "a", "history": [["h"]]}, "history[0]", "not a list of 1"),
    ({"prompt": "q", "response": "a", "history": [{"q": "h"}]}, "history[0]", "not an object"),
    ({"prompt": "q", "response": "a", "history": [["h", ""]]}, "history[0][1]", "is empty"),
    ({"prompt": "q", "response": "a", "history": [["h", 1]]}, "history[0][1]", "must be a string"),
    ({"prompt": "q", "response": "a", "system": 1}, "system", "must be a string"),
    ({"prompt": "q", "response": "a", "domain": 1}, "domain", "must be a string"),
    ({"prompt": "q", "response": "a", "facts": "a"}, "facts", "must be a list of strings, not a string"),
    ({"prompt": "q", "response": "a", "facts": ["b"]}, "facts[0]", "'b' does not stand in the answer"),
    ({"prompt": "q", "response": "a", "facts": [1]}, "facts[0]", "must be a string"),
    ({"prompt": "q", "response": "a", "facts": [""]}, "facts[0]", "is empty"),
    ({"prompt": "q", "response": "a", "images": [None]}, "images[0]", "must be a string, not null"),
    ({"instruction": "i", "output": ""}, "output", "is empty"),
    ({"instruction": "", "input": "", "output": "o"}, "instruction", "is empty"),
    ({"instruction": "i", "input": 3, "output": "o"}, "input", "must be a string"),
    ({"output": "o"}, "instruction", "missing"),
    ({"context": "c"}, "target", "missing"),
    ({"messages": []}, "messages", "is empty"),
    ({"messages": "hi"}, "messages", "must be a list of turns, not a string"),
    ({"messages": None}, "messages", "must be a list of turns, not null"),
    ({"messages": ["hi"]}, "messages[0]", "must be an object with role and content"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "found 'robot'"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "must be one of"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "found None"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "missing"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "is empty"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "must be an object"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        "found 'image_url'",
    ),
    ({"messages": [{"role": "user", "content": "x", "weight": 0}]}, "messages[0].weight", "not to one of user"),
    ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "messages[0].weight", "0 or 1, not 0.5"),
    ({"messages": [{"role": "assistant", "content": "x", "weight": True}]}, "messages[0].weight", "not True"),
    (_asked({"role": "assistant", "content": "a", "weight": 0}), "messages[1].weight", "0 on the last turn"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls", "one of user"),
    (_calling(1), "messages[1].tool_calls[0]", "must be an object"),
    (_calling({"function": {"arguments": "{}"}}), "messages[1].tool_calls[0].function.name", "missing"),
    (_calling({"function": {"name": "a b", "arguments": "{}"}}), "messages[1].tool_calls[0].function.name", "a word"),
    (_calling({"function": {"name": "f"}}), "messages[1].tool_calls[0].function.arguments", "missing"),
    (
        _calling({"function": {"name": "f", "arguments": "{"}}),
        "messages[1].tool_calls[0].function.arguments",
        "not JSON",
    ),
    (
        _calling({"function": {"name": "f", "arguments": "[]"}}),
        "messages[1].tool_calls[0].function.arguments",
        "object",
    ),
    (_calling({"name": "f", "arguments": {"a": math.nan}}), "messages[1].tool_calls[0].arguments", "written as JSON"),
    (_calling({"name": "f", "arguments": '{"a": "\\ud83d"}'}), "messages[1].tool_calls[0].arguments", "U+D83D"),
    (_calling({"name": "f", "arguments": {}, "type": "web"}), "messages[1].tool_calls[0].type", "not 'web'"),
    (_calling({"name": "f", "arguments": {}, "id": 1}), "messages[1].tool_calls[0].id", "must be a string"),
    (_asked({"role": "assistant", "tool_calls": {"name": "f"}}), "messages[1].tool_calls", "not an object"),
    (
        _asked({"role": "assistant", "content": "", "tool_calls": [CALL], "function_call": CALL}),
        "messages[1].function_call",
        "leave one out",
    ),
    (_asked({"role": "assistant", "content": None, "tool_calls": []}), "messages[1].content", "missing"),
    (
        _asked({"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "y", "content": ""}),
        "messages[2].tool_call_id",
        "'y' is no call of the assistant's turn before, which has 'x'",
    ),
    (
        _asked({"role": "assistant", "content": "a"}, {"role": "tool", "tool_call_id": "y", "content": ""}),
        "messages[2].tool_call_id",
        "which has none",
    ),
    (
        _asked({"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": 3, "content": ""}),
        "messages[2].tool_call_id",
        "must be a string",
    ),
    (
        {**_calling({"name": "f", "arguments": {}}), "tools": [{"name": "g"}, {"name": "h"}]},
        "messages[1].tool_calls[0]",
        "calls 'f', which is not among the row's tools: g, h",
    ),
    (_said("function_call", "f()"), "conversations[1].value", "must be a call"),
    (_said("function_call", ""), "conversations[1].value", "is empty"),
    (_said("function_call", [{"name": "f"}]), "conversations[1].value[0].arguments", "missing"),
    (_with(tools="[{"), "tools", "is not JSON"),
    (_with(tools='{"name": "f"}'), "tools", "not an object"),
    (_with(tools=3), "tools", "not a number"),
    (_with(tools=["f"]), "tools[0]", "must be an object"),
    (_with(tools=[{"type": "function", "function": {}}]), "tools[0].function.name", "missing"),
    (_with(tools=[{"type": "retrieval", "name": "f"}]), "tools[0].type", "not 'retrieval'"),
    (_with(tools=[{"name": "f", "parameters": "x"}]), "tools[0].parameters", "must be an object"),
    (_with(tools=[{"name": "f", "description": 1}]), "tools[0].description", "must be a string"),
    (_with(tools=[{"name": "f"}, {"name": "f"}]), "tools[1]", "second tool called 'f'"),
    (_with(functions="no"), "functions", "is not JSON"),
    (_with(weight=-1), "weight", "0 or more, not -1"),
    (_with(weight="1"), "weight", "not '1'"),
    (_with(weight=True), "weight", "not True"),
    (_with(weight=math.inf), "weight", "not inf"),
    (_with(weight=math.nan), "weight", "not nan"),
    (_with(augmented_from=3), "augmented_from", "must be a string"),
    (_turns("human"), "conversations", "must end with an assistant turn"),
    (_turns("human", "gpt", "human"), "conversations", "it ends with user"),
    (_turns("gpt", "human"), "conversations[0]", "assistant at the beginning"),
    (_turns("human", "human", "gpt"), "conversations[1]", "user after user"),
    (_turns("human", "gpt", "gpt"), "conversations[2]", "assistant after assistant"),
    (_turns("human", "gpt", "system"), "conversations[2]", "system after assistant"),
    (_turns("system", "gpt"), "conversations[1]", "assistant after system"),
    (_turns("human", "observation", "gpt"), "conversations[1]", "tool after user"),
    ({**_turns("system", "human", "gpt"), "system": "s"}, "conversations[0]", "system after system"),
]


@pytest.mark.parametrize(("row", "field", "reason"), BAD)
def test_bad_rows(row: dict[str, Any], field: str, reason: str) -> None:
    parsed = parse_row(row, "f:1")
    assert parsed.example is None
    assert any(f == field and reason in r for f, r in parsed.faults), parsed.faults


def test_all_faults_of_a_row_are_named_at_once() -> None:
    parsed = parse_row({"prompt": "", "response": 3, "domain": [], "history": [[1, 2]]}, "f:1")
    assert [f for f, _ in parsed.faults] == ["history[0][0]", "history[0][1]", "prompt", "response", "domain"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
QUESTIONS = ["prompt", "instruction", "input", "context", "system", "history", "messages", "conversations"]
ANSWERS = ["response", "output", "target", "facts", "images", "domain", "lang", "from", "value", "role", "content"]
ANSWERS += ["tools", "functions", "weight", "augmented_from"]
KEYS = st.sampled_from([*QUESTIONS, *ANSWERS])
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", 3, None])
CALLS = JSON | st.lists(st.sampled_from([CALL, CALL["function"]]), max_size=2)
EXTRAS = {"tool_calls": CALLS, "function_call": CALLS, "weight": JSON, "tool_call_id": JSON, "name": JSON}
TURNS = st.fixed_dictionaries({}, optional={"from": ROLES, "value": JSON, "role": ROLES, "content": JSON, **EXTRAS})


@given(st.dictionaries(KEYS, JSON | st.lists(TURNS, max_size=4), max_size=6))
def test_any_object_is_an_example_or_has_a_named_fault(row: dict[str, Any]) -> None:
    parsed = parse_row(row, "f:1")
    assert (parsed.example is None) == bool(parsed.faults)
    for field, reason in parsed.faults:
        assert field
        assert reason
        assert "\n" not in field
    if parsed.example is not None:
        assert parsed.example.messages[-1].role == "assistant"
        assert parsed.example.response.strip()
