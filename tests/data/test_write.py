"""A row that is written is read again as the same example."""

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pingjia.data.layouts import parse_row
from pingjia.data.write import row_of
from pingjia.types import Example, Message, ToolCall

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)
names = st.sampled_from(["f", "天气", "get_x"])
arguments = st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3) | st.none(), max_size=2)
TOOLS = tuple(
    json.dumps({"type": "function", "function": {"name": n}}, ensure_ascii=False) for n in ("f", "天气", "get_x")
)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    messages = [Message("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(texts)))
        if draw(st.booleans()):
            call = ToolCall(
                draw(names), json.dumps(draw(arguments), ensure_ascii=False), draw(st.sampled_from(["", "x"]))
            )
            messages.append(Message("assistant", draw(texts | st.just("")), (call,), learn=draw(st.booleans())))
            messages.append(Message("tool", draw(texts | st.just("")), name="f", tool_call_id=call.id))
        messages.append(Message("assistant", draw(texts), learn=draw(st.booleans())))
    return (*messages[:-1], replace(messages[-1], learn=True))


@given(conversations(), st.sampled_from([(), TOOLS]), st.sampled_from([1.0, 0.0, 2.5]), st.sampled_from([None, "f:3"]))
def test_rows_are_read_as_they_were_written(
    messages: tuple[Message, ...], tools: tuple[str, ...], weight: float, origin: str | None
) -> None:
    example = Example(messages, "f:1", tools=tools, weight=weight, augmented_from=origin)
    parsed = parse_row(json.loads(json.dumps(row_of(example))), "f:1")
    assert (parsed.faults, parsed.unread) == ([], ())
    assert parsed.example == example
