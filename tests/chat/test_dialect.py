"""Tools through templates: what each knows is found out, and what is rendered in training is rendered in serving.

The templates are small ones of our own that read tools the way the named families do.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pingjia.chat.dialect import Dialect
from pingjia.chat.hf import HFTokenizer
from pingjia.chat.tools import parse_tool_calls, read_tool
from pingjia.errors import ModelError, RequestError
from pingjia.types import Example, Message, ToolCall

Make = Callable[..., HFTokenizer]
TrainBpe = Callable[[list[str]], tokenizers.Tokenizer]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (  # results in one turn of the user; calls as tagged JSON
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "Functions:{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}{% for c in m.tool_calls %}"
    "{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n' }}<result>{{ m.content }}</result>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (  # tools in the first question; one call of bare JSON in a turn; a role of its own name for results
    "{% for m in messages %}<|start|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end|>\n\n"
    "{% if m.role == 'user' and loop.first and tools %}Respond with JSON.{% for t in tools %}"
    "{{ '\n' }}{{ t | tojson(indent=4) }}{% endfor %}\n\n{% endif %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
GLM4 = (  # tools on the system message; a call is a message with its name; the next turn ends an answer
    "[gMASK]<sop>{% for m in messages %}{% if m.tools is defined %}<|system|>\n可用工具{% for t in m.tools %}"
    "{{ '\n\n' }}## {{ t.function.name }}\n{{ t.function | tojson(indent=4) }}{% endfor %}{% endif %}"
    "{% if m.content %}<|{{ m.role }}|>{{ m.metadata }}\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRINGS = (  # arguments are joined as text
    "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}"
    '{{ "\n" }}<tool_call>{{ \'{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments + "}" }}'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (  # ids of nine characters, strict turns, a list of calls
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.last and tools %}[TOOLS] {{ tools | tojson }}{% endif %}"
    "[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}[CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{{ ', ' if not loop.last }}{% endfor %}]</s>{% elif m.role == 'assistant' %}{{ m.content }}</s>"
    "{% elif m.role == 'tool' %}[RESULT] {{ m.tool_call_id }} {{ m.content }}[/RESULT]{% endif %}{% endfor %}"
)
STRICT = (  # knows users and assistants, in turn
    "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ELSE = (  # takes every other role for a system message
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MOVES = CHATML.replace(  # after a result, an answer does not stand where its prompt ends
    "<|im_start|>assistant", "<|im_start|>{{ 'assistant' if messages[-1].role in ('system', 'user') else 'reply' }}"
)
PRINTS = QWEN.replace("c.function.arguments | tojson", "c.function.arguments")  # a dict as Python prints it
ONLY_TOOLS = CHATML.replace("{% for m", "{% if tools %}{{ tools | tojson }}{% endif %}{% for m", 1)

TEMPLATES: dict[str, tuple[str, list[str], dict[str, Any], Dialect]] = {
    "qwen": (QWEN, ["<|im_start|>", "<|im_end|>"], {}, Dialect("variable", "object")),
    "llama3": (LLAMA3, ["<|start|>", "<|end|>", "<|eot|>"], {"eos_token": "<|eot|>"}, Dialect("variable", "object")),
    "glm4": (
        GLM4,
        ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
        {"eos_token": "<sop>", "stop_tokens": ["<|user|>", "<|observation|>"]},
        Dialect("system", "metadata", "observation"),
    ),
    "strings": (STRINGS, ["<|im_start|>", "<|im_end|>"], {}, Dialect("variable", "string")),
    "mistral": (
        MISTRAL,
        ["[INST]", "[/INST]", "[CALLS]", "[TOOLS]", "[RESULT]", "[/RESULT]", "</s>"],
        {"eos_token": "</s>"},
        Dialect("variable", "object", system=False),
    ),
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], {}, Dialect()),
    "only_tools": (ONLY_TOOLS, ["<|im_start|>", "<|im_end|>"], {}, Dialect()),
    "prints": (PRINTS, ["<|im_start|>", "<|im_end|>"], {}, Dialect("variable", "string")),
    "else": (ELSE, ["<|im_start|>", "<|im_end|>"], {}, Dialect(results=None)),
    "moves": (MOVES, ["<|im_start|>", "<|im_end|>"], {}, Dialect(results=None)),
    "strict": (STRICT, ["<|im_start|>", "<|im_end|>"], {}, Dialect(results=None, system=False)),
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "天气")]
DESCRIBED = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
F, G = ToolCall("f", '{"a": 1, "b": "x y"}', "call_abc1"), ToolCall("天气", '{"城市": ["北京", null]}', "call_abc2")


@pytest.fixture(params=sorted(TEMPLATES))
def named(request: pytest.FixtureRequest, make_model: Make, train_bpe: TrainBpe) -> tuple[str, HFTokenizer]:
    template, specials, config, _ = TEMPLATES[request.param]
    return request.param, make_model(train_bpe(specials), template, **config)


@pytest.fixture
def tokenizer(named: tuple[str, HFTokenizer]) -> HFTokenizer:
    return named[1]


def load(name: str, make_model: Make, train_bpe: TrainBpe) -> HFTokenizer:
    template, specials, config, _ = TEMPLATES[name]
    return make_model(train_bpe(specials), template, **config)


def text_of(tokenizer: HFTokenizer, ids: Sequence[int]) -> str:
    return tokenizer.vocabulary.decode(list(ids), skip_special_tokens=False)


# ---- what a template knows


def test_what_a_template_knows_is_found_out(named: tuple[str, HFTokenizer]) -> None:
    name, tokenizer = named
    assert tokenizer._dialect == TEMPLATES[name][3]


def test_native_tools_are_handed_on(make_model: Make, train_bpe: TrainBpe) -> None:
    tokenizer = load("qwen", make_model, train_bpe)
    messages = [
        Message("system", "简短"),
        Message("user", "?"),
        Message("assistant", "好", (F, G)),
        Message("tool", "rg", tool_call_id="call_abc2"),
        Message("tool", "rf", tool_call_id="call_abc1"),
    ]
    assert text_of(tokenizer, tokenizer.render(messages, tools=TOOLS)) == (
        "<|im_start|>system\n简短\n\nFunctions:\n"
        '{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}\n'
        '{"type": "function", "function": {"name": "天气", "parameters": {"type": "object"}}}<|im_end|>\n'
        "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n好\n"
        '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "x y"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "天气", "arguments": {"城市": ["北京", null]}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<result>rf</result>\n<result>rg</result><|im_end|>\n<|im_start|>assistant\n"
    )


def test_glm4_reads_its_own_spelling(make_model: Make, train_bpe: TrainBpe) -> None:
    tokenizer = load("glm4", make_model, train_bpe)
    messages = [
        Message("user", "?"),
        Message("assistant", "好", (F,)),
        Message("tool", "r"),
        Message("assistant", "ok"),
    ]
    encoded = tokenizer.encode_example(Example(tuple(messages), tools=('{"name": "f"}',)))
    assert text_of(tokenizer, encoded.ids) == (
        '[gMASK]<sop><|system|>\n可用工具\n\n## f\n{\n    "name": "f"\n}<|user|>\n?<|assistant|>\n好'
        '<|assistant|>f\n{"a": 1, "b": "x y"}<|observation|>\nr<|assistant|>\nok<|user|>'
    )


def test_a_call_at_the_end_is_closed_by_what_waits_for_its_result(make_model: Make, train_bpe: TrainBpe) -> None:
    tokenizer = load("glm4", make_model, train_bpe)
    encoded = tokenizer.encode_example(Example((Message("user", "?"), Message("assistant", "", (F,)))))
    assert text_of(tokenizer, encoded.ids).endswith('f\n{"a": 1, "b": "x y"}<|observation|>')
    assert encoded.learn[-1]


def test_the_plain_form_in_a_template_that_knows_nothing(make_model: Make, train_bpe: TrainBpe) -> None:
    tokenizer = load("chatml", make_model, train_bpe)
    messages = [Message("user", "?"), Message("assistant", "", (F,)), Message("tool", "r")]
    assert text_of(tokenizer, tokenizer.render(messages, tools=TOOLS[:1])) == (
        '<|im_start|>system\n# 工具 / Tools\n{"name": "f", "parameters": {"type": "object"}}\n# 调用 / Call\n'
        '{"name": "...", "arguments": {...}}<|im_end|>\n<|im_start|>user\n?<|im_end|>\n'
        '<|im_start|>assistant\n{"name": "f", "arguments": {"a": 1, "b": "x y"}}<|im_end|>\n'
        "<|im_start|>tool\nr<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_plain_form_in_a_template_with_strict_turns(make_model: Make, train_bpe: TrainBpe) -> None:
    tokenizer = load("strict", make_model, train_bpe)
    messages = [Message("user", "?"), Message("assistant", "", (F, G)), Message("tool", "r"), Message("tool", "s")]
    text = text_of(tokenizer, tokenizer.render(messages, tools=TOOLS[:1]))
    assert text.startswith("<|im_start|>user\n# 工具 / Tools\n")
    assert text.endswith(
        "<|im_start|>user\n# 结果 / Result (f)\nr\n# 结果 / Result (天气)\ns<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_a_template_refuses_names_the_messages(make_model: Make, train_bpe: TrainBpe) -> None:
    tokenizer = load("llama3", make_model, train_bpe)
    with pytest.raises(RequestError, match="one call at a time") as refused:
        tokenizer.render([Message("user", "?"), Message("assistant", "", (F, G))], False)
    assert refused.value.param == "messages"


# ---- one prompt for training and serving

words = st.text(st.sampled_from("你好天气 abc\n<|im_end|>{}\"'"), min_size=1, max_size=12).filter(str.strip)
calls = st.sampled_from([F, G, ToolCall("f", '{"<|im_end|>": "<|user|>[INST]"}', "call_abc3")])


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    messages = [Message("system", draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(words)))
        if draw(st.booleans()):
            call = draw(calls)
            messages.append(Message("assistant", draw(words | st.just("")), (call,), learn=draw(st.booleans())))
            messages.append(Message("tool", draw(words), tool_call_id=draw(st.sampled_from(["", call.id]))))
        messages.append(Message("assistant", draw(words)))
    if len(messages) > 2 and messages[-2].role == "tool" and draw(st.booleans()):
        messages = messages[:-2]  # ends with the call
    return (*messages[:-1], Message("assistant", messages[-1].content, messages[-1].tool_calls))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversations(), st.sampled_from([[], TOOLS]))
def test_the_prompt_of_training_is_the_prompt_of_serving(
    named: tuple[str, HFTokenizer], messages: tuple[Message, ...], tools: list[dict[str, Any]]
) -> None:
    name, tokenizer = named
    if name in ("mistral", "strict"):
        messages = tuple(m for m in messages if m.role != "system")
    if name == "mistral":
        tools = []  # it moves the list of tools to the last question: served with tools, not trained (see below)
    example = Example(messages, tools=tuple(map(read_tool, tools)))
    encoded = tokenizer.encode_example(example)
    for i, message in enumerate(messages):
        if i and message.role == "assistant":
            prompt = tokenizer.render(messages[:i], tools=example.tools)
            assert list(encoded.ids[: len(prompt)]) == prompt
            assert not encoded.learn[len(prompt) - 1]
            assert encoded.learn[len(prompt)] == message.learn
    assert encoded.ids[-1] in tokenizer.stop_ids
    assert encoded.learn[-1]


def test_a_template_that_moves_the_tools_is_served_but_not_trained(make_model: Make, train_bpe: TrainBpe) -> None:
    tokenizer = load("mistral", make_model, train_bpe)
    turns = (Message("user", "?"), Message("assistant", "a"), Message("user", "?"), Message("assistant", "b"))
    assert "[TOOLS]" in text_of(tokenizer, tokenizer.render(turns[:3], tools=TOOLS))
    with pytest.raises(ModelError, match="rewrites earlier turns"):
        tokenizer.encode_example(Example(turns, tools=tuple(map(read_tool, TOOLS))))


def test_calls_that_were_learnt_are_found_in_an_answer(named: tuple[str, HFTokenizer]) -> None:
    name, tokenizer = named
    turns = (Message("user", "?"), Message("assistant", "" if name in ("llama3", "mistral") else "好的。", (F,)))
    encoded = tokenizer.encode_example(Example(turns))
    learnt = [i for i, learn in zip(encoded.ids, encoded.learn, strict=True) if learn]
    text, found = parse_tool_calls(tokenizer.decode(learnt), ["f"])
    assert text == turns[1].content
    assert found == (ToolCall(F.name, F.arguments),)


def test_special_tokens_in_tools_and_calls_stay_text(tokenizer: HFTokenizer) -> None:
    special = next(t for t in tokenizer._specials.ids if t in ("<|im_end|>", "<|eot|>", "<|user|>", "</s>"))
    quiet = "x" * len(special)

    def ids(typed: str) -> list[int]:
        tool = {"name": "f", "description": typed, "parameters": {"properties": {typed: {"type": "string"}}}}
        call = ToolCall("f", f'{{"{typed}": "{typed}"}}')
        messages = [Message("user", "?"), Message("assistant", "", (call,)), Message("tool", typed)]
        return tokenizer.render(messages, tools=[tool])

    typed, plain = ids(special), ids(quiet)
    special_ids = set(tokenizer._specials.ids.values())
    assert [i for i in typed if i in special_ids] == [i for i in plain if i in special_ids]
    assert text_of(tokenizer, typed) == text_of(tokenizer, plain).replace(quiet, special)


def test_turns_that_are_not_wanted_are_read_as_ever(tokenizer: HFTokenizer) -> None:
    def encoded(learn: bool) -> Any:
        turns = [Message("user", "?"), Message("assistant", "一", (F,), learn=learn), Message("tool", "r")]
        return tokenizer.encode_example(Example((*turns, Message("assistant", "二"))))

    assert encoded(True).ids == encoded(False).ids
    assert encoded(True).num_learnt > encoded(False).num_learnt > 0
    with pytest.raises(RequestError, match="f:3: the last answer is not to be learnt"):
        tokenizer.encode_example(Example((Message("user", "?"), Message("assistant", "一", learn=False)), where="f:3"))


def test_conversations_without_tools_never_ask_what_a_template_knows(tokenizer: HFTokenizer) -> None:
    tokenizer.encode_example(Example((Message("user", "?"), Message("assistant", "ok"))))
    assert "_dialect" not in vars(tokenizer)


# ---- published templates

# Whose calls are found again. Others write them in forms that are not read, such as XML argument by argument.
FOUND = {"qwen2_5", "qwen3", "qwen3_vl", "qwen3_instruct_2507", "llama3_1", "llama3_2", "llama3", "phi3", "phi3_5"}
FOUND |= {"gemma", "gemma3", "cohere", "cohere2", "lfm2"}


def published() -> dict[str, str]:
    """Templates of public models, which the package trl holds."""
    package = importlib.util.find_spec("trl")
    folder = Path(package.origin).parent / "chat_templates" if package and package.origin else Path("none")
    files = (f for f in sorted(folder.glob("*.jinja")) if "training" not in f.stem)
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


PUBLISHED = published()


@pytest.mark.skipif(not PUBLISHED, reason="the published templates in the package trl are needed")
def test_the_published_templates_we_name_are_there() -> None:
    assert set(PUBLISHED) >= FOUND


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_templates_train_as_they_serve(name: str, make_model: Make, train_bpe: TrainBpe) -> None:
    """Whatever trains without tools trains with them, and the prompts are the same in serving."""
    source = PUBLISHED[name]
    found = re.findall(r"<[|｜][^|｜<>\n]{1,30}[|｜]?>|<\w{1,30}[|｜]>|<\w+_of_\w+>", source)
    specials = sorted({"<bos>", "<eos>", "<|im_end|>", *found})
    stops = [t for t in ("<|user|>", "<|observation|>", "<|tool_response>", "<|call|>") if t in specials]
    tokenizer = make_model(train_bpe(specials), source, bos_token="<bos>", eos_token="<eos>", stop_tokens=stops)
    turns = (Message("user", "?"), Message("assistant", "", (F,)), Message("tool", "20"), Message("assistant", "ok"))
    try:
        tokenizer.encode_example(Example((turns[0], turns[3], turns[0], turns[3])))
    except (ModelError, RequestError) as e:
        pytest.skip(f"does not train without tools either: {e}")
    encoded = tokenizer.encode_example(Example(turns, tools=(read_tool(DESCRIBED),)))
    for size in (1, 3):
        prompt = tokenizer.render(turns[:size], tools=[DESCRIBED])
        assert list(encoded.ids[: len(prompt)]) == prompt
        assert encoded.learn[len(prompt)]
    start, end = (len(tokenizer.render(turns[:size], tools=[DESCRIBED])) for size in (1, 3))
    learnt = [i for i, learn in zip(encoded.ids[start:end], encoded.learn[start:end], strict=True) if learn]
    assert "x y" in tokenizer.decode(learnt)
    if name in FOUND:
        assert parse_tool_calls(tokenizer.decode(learnt)) == ("", (ToolCall(F.name, F.arguments),))
