"""Tools of a request or a row: what is read, what belongs together, and the plain form."""

import json
from typing import Any

import pytest

from pingjia.chat.tokenizer import as_messages
from pingjia.chat.tools import Malformed, as_row, as_tools, linked, plain, read_call, read_tool
from pingjia.errors import RequestError
from pingjia.types import Message, ToolCall

TOOL = {"type": "function", "function": {"name": "天气", "description": "查天气", "parameters": {"type": "object"}}}
A, B = ToolCall("a", '{"x": 1}', "1"), ToolCall("b", "{}", "2")
Q = Message("user", "q")


# ---- reading


@pytest.mark.parametrize("tool", [TOOL, TOOL["function"], {**TOOL["function"], "type": "function"}])  # type: ignore[dict-item]
def test_tools_have_one_text(tool: dict[str, Any]) -> None:
    assert read_tool(tool) == json.dumps(TOOL, ensure_ascii=False)
    assert as_tools([tool]) == as_tools([json.dumps(tool)]) == (TOOL,)


def test_fields_that_are_unknown_are_kept_in_their_order() -> None:
    function = {"strict": True, "name": "f", "parameters": None, "x": [1.5]}
    assert json.loads(read_tool(function))["function"] == function
    assert [*json.loads(read_tool(function))["function"]] == [*function]


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("x", "tools must be a list, not str"),
        ({"name": "f"}, "tools must be a list, not dict"),
        ([3], r"tools\[0\]: must be an object"),
        ([TOOL, "{"], r"tools\[1\]: is not JSON"),
        ([{"function": {"name": "a b"}}], r"tools\[0\]\.function\.name: must be a word"),
        ([{"name": "f", "parameters": []}], r"tools\[0\]\.parameters: must be an object"),
        ([{"name": "f", "x": "\ud83d"}], r"tools\[0\]: holds half of a surrogate pair \(U\+D83D\)"),
        ([{"name": "f", "x": {1, 2}}], r"tools\[0\]: cannot be written as JSON"),
    ],
)
def test_bad_tools_are_request_errors(tools: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        as_tools(tools)
    assert refused.value.param == "tools"


@pytest.mark.parametrize("arguments", [{"x": 1.50, "城": "北"}, '{"x":1.50,"城":"\\u5317"}'])
def test_arguments_have_one_text(arguments: Any) -> None:
    found = read_call({"id": "c", "function": {"name": "f", "arguments": arguments}})
    assert found == ToolCall("f", '{"x": 1.5, "城": "北"}', "c")


def test_no_text_is_no_arguments() -> None:
    assert read_call({"name": "f", "arguments": " "}) == ToolCall("f", "{}")


def test_a_bad_call_says_where() -> None:
    with pytest.raises(Malformed) as refused:
        read_call({"function": {"name": "f", "arguments": "{"}})
    assert (refused.value.field, "not JSON" in refused.value.reason) == ("function.arguments", True)


def test_messages_are_read_and_written_as_openai_has_them() -> None:
    rows = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "a", "arguments": {}}}]},
        {"role": "tool", "content": "r", "tool_call_id": "1", "name": "a"},
    ]
    messages = as_messages(rows)
    assert messages[1:] == (
        Message("assistant", "", (ToolCall("a", "{}", "1"),)),
        Message("tool", "r", name="a", tool_call_id="1"),
    )
    written = [as_row(m) for m in messages]
    assert as_messages(written) == messages
    assert written[0] == rows[0]
    assert json.loads(json.dumps(written)) == written


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"role": "user", "content": "x", "tool_calls": [A]}, r"messages\[0\]: unknown key 'tool_calls'"),
        (Message("user", "x", (A,)), r"messages\[0\]\.tool_calls belongs to a message of role assistant, not user"),
        (Message("user", "x", tool_call_id="1"), "belongs to a message of role tool"),
        ({"role": "assistant", "content": None}, "content must be a string, not NoneType"),
        ({"role": "assistant", "tool_calls": 3}, "tool_calls must be a list, not int"),
        ({"role": "assistant", "tool_calls": [3]}, r"messages\[0\]\.tool_calls\[0\]: must be an object"),
        ({"role": "assistant", "tool_calls": [{"name": "f"}]}, r"tool_calls\[0\]\.arguments: missing"),
        (Message("assistant", "", (ToolCall("f", "{"),)), r"tool_calls\[0\]\.function\.arguments: is not JSON"),
        (Message("assistant", "", (ToolCall("f", "{}", "\ud83d"),)), r"tool_calls\[0\]\.id: .*U\+D83D"),
        ({"role": "tool", "content": "x", "tool_call_id": 3}, "tool_call_id must be a string, not int"),
        ({"role": "tool", "content": "x", "name": "\ud83d"}, r"name: .*U\+D83D"),
    ],
)
def test_bad_messages_are_request_errors(row: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        as_messages([row])
    assert refused.value.param == "messages"


# ---- what belongs together


def test_results_come_in_the_order_of_their_calls() -> None:
    turns = (Message("assistant", "", (A, B)), Message("tool", "rb", tool_call_id="2"), Message("tool", "ra"))
    assert linked([Q, *turns]) == (
        Q,
        turns[0],
        Message("tool", "ra", name="a", tool_call_id="1"),
        Message("tool", "rb", name="b", tool_call_id="2"),
    )


def test_ids_that_are_missing_are_counted() -> None:
    bare = Message("assistant", "", (ToolCall("a", "{}"), ToolCall("b", "{}")))
    turns = [bare, Message("tool", "1"), Message("tool", "2"), bare]
    found = linked(turns)
    assert [call.id for m in found for call in m.tool_calls] == ["000000000", "000000001", "000000002", "000000003"]
    assert [(m.name, m.tool_call_id) for m in found[1:3]] == [("a", "000000000"), ("b", "000000001")]
    for size in range(len(turns) + 1):
        assert linked(turns[:size]) == found[:size]


def test_results_without_a_call_stay_where_they_are() -> None:
    turns = (Q, Message("assistant", "calling f"), Message("tool", "1"), Message("tool", "2", tool_call_id="x"))
    assert linked(turns) == turns
    more = (Message("assistant", "", (A,)), Message("tool", "1"), Message("tool", "2"))
    assert [m.content for m in linked(more)] == ["", "1", "2"]


# ---- the plain form

LIST = """# 工具 / Tools
{"name": "天气", "description": "查天气", "parameters": {"type": "object"}}
# 调用 / Call
{"name": "...", "arguments": {...}}"""
CALLING = Message("assistant", "好的", (A, B), learn=False)
RESULTS = (Message("tool", "ra", name="a"), Message("tool", "rb"))
SAID = Message("assistant", '好的\n{"name": "a", "arguments": {"x": 1}}\n{"name": "b", "arguments": {}}', learn=False)


def test_tools_are_listed_in_the_system_message() -> None:
    assert plain([Q], [TOOL], has_results=True) == (Message("system", LIST), Q)
    system = Message("system", "简短")
    assert plain([system, Q], [TOOL], has_results=True) == (Message("system", f"简短\n\n{LIST}"), Q)


def test_tools_are_listed_before_the_first_question_without_a_system_role() -> None:
    found = plain([Q, Message("assistant", "a"), Q], [TOOL], has_results=True, has_system=False)
    assert found == (Message("user", f"{LIST}\n\nq"), Message("assistant", "a"), Q)


def test_calls_are_lines_and_results_keep_their_role() -> None:
    assert plain([Q, CALLING, *RESULTS], [], has_results=True) == (Q, SAID, *RESULTS)


def test_results_become_one_question_without_a_role() -> None:
    asked = Message("user", "# 结果 / Result (a)\nra\n# 结果 / Result\nrb")
    answer = Message("assistant", "done")
    assert plain([Q, CALLING, *RESULTS], [], has_results=False) == (Q, SAID, asked)
    assert plain([Q, CALLING, *RESULTS, answer], [], has_results=False) == (Q, SAID, asked, answer)
