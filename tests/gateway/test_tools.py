"""Tools: what reaches the model, and what is read from its answers, whole, streamed and later."""

from __future__ import annotations

import json

import pytest
from gateway_fakes import Script
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.chat.tools import parse_tool_calls
from pingjia.gateway.tools import CallReader, Toolbox

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "现在几点"}}
USER = [{"role": "user", "content": "hi"}]
CALL = '{"name": "weather", "arguments": {"city": "北京"}}'

ANSWERS = {
    "plain": (f"我来查。\n{CALL}", "我来查。", ["weather"]),
    "bare": (CALL, None, ["weather"]),
    "qwen": (f"<tool_call>\n{CALL}\n</tool_call>", None, ["weather"]),
    "two": (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", None, ["weather", "weather"]),
    "list": (f"[{CALL}]", None, ["weather"]),
    "glm4": ('weather\n{"city": "北京"}', None, ["weather"]),
    "chatglm3": ('weather\n```python\ntool_call(city="北京")\n```', None, ["weather"]),
    "text": ("天气很好 { ok }", "天气很好 { ok }", []),
    "half": ('{"name": "weather", "argu', '{"name": "weather", "argu', []),
    "unknown": ('{"name": "rm", "arguments": {}}', '{"name": "rm", "arguments": {}}', []),
    "json": ('{"a": 1}', '{"a": 1}', []),
}


def ask(gateway, **fields):
    return gateway.openai().chat.completions.create(
        **{"model": "base", "messages": USER, "tools": [WEATHER, CLOCK], **fields}
    )


def joined(stream):
    """What a client puts together from the chunks of one choice."""
    content, calls, reasons = "", {}, []
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                calls[call.index] = (call.id, call.function.name, call.function.arguments)
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert len(reasons) == 1
    return content, [calls[i] for i in sorted(calls)], reasons[0]


@pytest.mark.parametrize("form", list(ANSWERS))
def test_calls_in_a_whole_answer(gateway, form):
    gateway.backend.script.text, content, names = ANSWERS[form]
    choice = ask(gateway).choices[0]
    assert choice.message.content == content
    assert [call.function.name for call in choice.message.tool_calls or ()] == names
    assert all(json.loads(c.function.arguments) == {"city": "北京"} for c in choice.message.tool_calls or ())
    assert len({call.id for call in choice.message.tool_calls or ()}) == len(names)
    assert choice.finish_reason == ("tool_calls" if names else "stop")


@pytest.mark.parametrize("form", list(ANSWERS))
def test_calls_in_a_stream(gateway, form):
    gateway.backend.script.text, content, names = ANSWERS[form]
    text, calls, reason = joined(ask(gateway, stream=True))
    assert (text, [name for _, name, _ in calls]) == (content or "", names)
    assert all(id_.startswith("call_") for id_, _, _ in calls)
    assert reason == ("tool_calls" if names else "stop")


def test_text_is_not_held_back_longer_than_it_may_become_a_call(gateway):
    gateway.backend.script = Script(text="hello there, weather is fine")
    chunks = [c.choices[0].delta.content for c in ask(gateway, stream=True) if c.choices[0].delta.content]
    assert len(chunks) > 10


def test_tools_and_calls_and_results_reach_the_model(gateway):
    history = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"北京"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
    ]  # fmt: skip
    ask(gateway, messages=history)
    said = gateway.tokenizer.decode(gateway.backend.requests[0].prompt_ids)
    assert "现在几点" in said
    assert CALL in said
    assert "tool: rain" in said


def test_choice_none_shows_no_tools_and_reads_no_calls(gateway):
    gateway.backend.script.text = CALL
    choice = ask(gateway, tool_choice="none").choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")
    assert "weather" not in gateway.tokenizer.decode(gateway.backend.requests[0].prompt_ids)


def test_a_demanded_call_is_a_form_of_the_answer(gateway):
    gateway.backend.script.text = CALL
    named = {"type": "function", "function": {"name": "weather"}}
    assert ask(gateway, tool_choice=named).choices[0].message.tool_calls[0].function.name == "weather"
    schema = json.loads(gateway.backend.requests[0].sampling.grammar.text)
    assert schema["properties"] == {"name": {"const": "weather"}, "arguments": PARAMETERS}
    ask(gateway, tool_choice="required")
    schemas = json.loads(gateway.backend.requests[1].sampling.grammar.text)["anyOf"]
    assert [s["properties"]["name"]["const"] for s in schemas] == ["weather", "clock"]


def test_references_inside_parameters_are_found_where_they_stand_now(gateway):
    parameters = {"type": "object", "properties": {"at": {"$ref": "#/$defs/At"}}, "$defs": {"At": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    ask(gateway, tools=[CLOCK, tool], tool_choice="required")
    schema = json.loads(gateway.backend.requests[0].sampling.grammar.text)
    ref = schema["anyOf"][1]["properties"]["arguments"]["properties"]["at"]["$ref"]
    node = schema
    for part in ref.removeprefix("#/").split("/"):
        node = node[int(part)] if isinstance(node, list) else node[part]
    assert node == {"type": "integer"}


def test_at_most_one_call_when_asked_so(gateway):
    gateway.backend.script.text = ANSWERS["two"][0]
    assert len(ask(gateway, parallel_tool_calls=False).choices[0].message.tool_calls) == 1


def test_an_answer_that_was_cut_says_so(gateway):
    gateway.backend.script.text = f"<tool_call>{CALL}</tool_call> and more"
    choice = ask(gateway, max_tokens=len(f"<tool_call>{CALL}</tool_call>".encode())).choices[0]
    assert (choice.finish_reason, len(choice.message.tool_calls)) == ("length", 1)


def test_several_answers_have_calls_of_their_own(gateway):
    gateway.backend.script.text = lambda request: CALL if request.sampling.seed == 7 else "text"
    choices = ask(gateway, n=2, seed=7).choices
    assert [c.finish_reason for c in choices] == ["tool_calls", "stop"]


def test_later_asked_answers_have_calls(gateway, eventually):
    gateway.backend.script.text = CALL
    body = {"model": "base", "messages": USER, "tools": [WEATHER]}
    job = gateway.http.post("/v1/chat/completions", json=body, headers={"prefer": "respond-async"})
    place = job.headers["location"]
    eventually(lambda: gateway.http.get(place).json()["status"] == "completed", "the job ends")
    message = gateway.http.get(place).json()["result"]["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {}}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_object"}}, "tools"),
        ({"messages": [*USER, {"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages"),
        ({"messages": [*USER, {"role": "assistant", "content": None}, *USER]}, "messages[1].content"),
        ({"messages": [*USER, {"role": "assistant", "tool_calls": [{"function": {}}]}, *USER]}, "messages"),
    ],
)
def test_refused_naming_the_field(gateway, fields, param):
    body = {"model": "base", "messages": USER, "tools": [WEATHER], **fields}
    response = gateway.http.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert gateway.backend.requests == []


_PIECES = ("{", "[", "\n", " ", "weather", "clock", "<tool_call>", "</tool_call>", CALL, "```python\n", "x", "。", "<")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(_PIECES), max_size=8), st.data())
def test_a_stream_shows_what_the_whole_answer_says(pieces, data):
    text = "".join(pieces)
    box, shown, at = Toolbox(names=("weather", "clock")), "", 0
    reader = CallReader(box)
    while at < len(text):
        size = data.draw(st.integers(1, 6))
        shown += reader.feed(text[at : at + size])
        at += size
    rest, calls = reader.end()
    whole, whole_calls = box.read(text)
    assert [c.name for c in calls] == [c.name for c in whole_calls]
    assert (shown + rest).strip() == whole.strip()
    if not calls:
        assert shown + rest == text
    assert parse_tool_calls(shown)[1] == ()
