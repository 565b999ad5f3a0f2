"""Every layout of a row, what is taken from it, and every way it can be wrong."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data.layouts import LAYOUTS, parse_row

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
                {"from": "function_call", "value": "f()"},
                {"from": "observation", "value": ""},
                {"from": "assistant", "value": "a"},
            ]
        },
        [("system", ""), ("user", "q"), ("assistant", "f()"), ("tool", ""), ("assistant", "a")],
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
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content", "not a list"),
    ({"messages": [{"role": "user", "content": "x", "weight": 0}]}, "messages[0].weight", "is not supported"),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
        "messages[0].tool_calls",
        "not supported",
    ),
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
KEYS = st.sampled_from([*QUESTIONS, *ANSWERS])
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", 3, None])
TURNS = st.fixed_dictionaries({}, optional={"from": ROLES, "value": JSON, "role": ROLES, "content": JSON})


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
