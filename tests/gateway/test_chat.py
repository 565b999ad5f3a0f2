"""/v1/chat/completions, through OpenAI's own client where it can say it, else raw."""

from __future__ import annotations

import json

import openai
import pytest
from gateway_fakes import Script

USER = [{"role": "user", "content": "hi"}]
HI_TOKENS = 1 + len("user: hi\nassistant: ")


def test_whole_answer(gateway):
    answer = gateway.openai().chat.completions.create(model="base", messages=USER)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "你好, world", "stop")
    assert (answer.object, answer.model, choice.index, choice.logprobs) == ("chat.completion", "base", 0, None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (HI_TOKENS, 13)
    assert answer.usage.total_tokens == HI_TOKENS + 13
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.id.startswith("chatcmpl-")


def test_stream(gateway):
    chunks = list(gateway.openai().chat.completions.create(model="base", messages=USER, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "你好, world"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)
    assert {c.object for c in chunks} == {"chat.completion.chunk"}


def test_stream_with_usage(gateway):
    options = {"include_usage": True}
    chunks = list(
        gateway.openai().chat.completions.create(model="base", messages=USER, stream=True, stream_options=options)
    )
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (HI_TOKENS, 13)
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert all(c.usage is None for c in chunks[:-1])


def test_max_tokens_ends_with_length(gateway):
    answer = gateway.openai().chat.completions.create(model="base", messages=USER, max_tokens=3)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("你", "length")
    assert answer.usage.completion_tokens == 3


def test_max_completion_tokens_wins(gateway):
    gateway.openai().chat.completions.create(model="base", messages=USER, max_tokens=9, max_completion_tokens=2)
    assert gateway.backend.requests[-1].sampling.max_tokens == 2


@pytest.mark.parametrize("stop", [",", [",", "xyz"]])
def test_stop(gateway, stop):
    answer = gateway.openai().chat.completions.create(model="base", messages=USER, stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("你好", "stop")


def test_n_makes_as_many_requests_with_their_own_seeds(gateway):
    gateway.backend.script = Script(text=lambda r: f"seed {r.sampling.seed}")
    answer = gateway.openai().chat.completions.create(model="base", messages=USER, n=3, seed=7, temperature=1)
    assert [(c.index, c.message.content) for c in answer.choices] == [(0, "seed 7"), (1, "seed 8"), (2, "seed 9")]
    assert answer.usage.prompt_tokens == HI_TOKENS  # the prompt is billed once
    assert answer.usage.completion_tokens == 18
    assert len({r.id for r in gateway.backend.requests}) == 3


def test_n_without_seed_draws_different_ones(gateway):
    gateway.openai().chat.completions.create(model="base", messages=USER, n=4)
    seeds = [r.sampling.seed for r in gateway.backend.requests]
    assert None not in seeds
    assert len(set(seeds)) == 4


def test_the_largest_seed_does_not_overflow(gateway):
    assert gateway.chat(n=2, seed=2**63 - 1).status_code == 200
    assert sorted(r.sampling.seed for r in gateway.backend.requests) == [-(2**63), 2**63 - 1]


def test_one_choice_without_seed_leaves_it_open(gateway):
    gateway.chat()
    assert gateway.backend.requests[-1].sampling.seed is None


def test_n_streams_every_choice(gateway):
    gateway.backend.script = Script(text=lambda r: f"seed {r.sampling.seed}", token_s=0.001)
    texts, ends, roles = {}, {}, []
    for chunk in gateway.openai().chat.completions.create(model="base", messages=USER, n=2, seed=1, stream=True):
        choice = chunk.choices[0]
        roles += [choice.index] if choice.delta.role else []
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        ends[choice.index] = choice.finish_reason
    assert texts == {0: "seed 1", 1: "seed 2"}
    assert ends == {0: "stop", 1: "stop"}
    assert sorted(roles) == [0, 1]


def test_sampling_arrives_as_asked(gateway):
    gateway.chat(
        temperature=1, top_p=0.5, top_k=7, min_p=0.1, repetition_penalty=1.2, frequency_penalty=0.3,
        presence_penalty=-0.4, seed=5, stop=["a", "b"], stop_token_ids=[9], ignore_eos=True, max_tokens=11,
    )  # fmt: skip
    s = gateway.backend.requests[-1].sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty) == (1, 0.5, 7, 0.1, 1.2)
    assert (s.frequency_penalty, s.presence_penalty, s.seed, s.max_tokens) == (0.3, -0.4, 5, 11)
    assert (s.stop, s.stop_token_ids, s.ignore_eos, s.logprobs) == (("a", "b"), (9,), True, None)


def test_bias_and_early_ends_arrive_as_asked(gateway):
    gateway.chat(logit_bias={"5": -100, "7": 1.5}, min_tokens=600, max_tokens=700, include_stop_str_in_output=True)
    s = gateway.backend.requests[-1].sampling
    assert dict(s.logit_bias) == {5: -100, 7: 1.5}
    assert (s.min_tokens, s.max_tokens, s.include_stop_str_in_output) == (600, 700, True)


SCHEMA = {"type": "object", "properties": {"城市": {"type": "string"}}}


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "text"}}, None, None),
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            "json_schema",
            SCHEMA,
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"regex": "[0-9]+"}}, "regex", "[0-9]+"),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"guided_regex": "a|b"}, "regex", "a|b"),
        ({"guided_choice": ["是", "否"]}, "choice", ["是", "否"]),
        ({"guided_choice": None, "guided_json": None, "structured_outputs": None, "response_format": None}, None, None),
    ],
)
def test_the_form_of_the_answer_arrives_as_asked(gateway, fields, kind, text):
    assert gateway.chat(**fields).status_code == 200
    grammar = gateway.backend.requests[-1].sampling.grammar
    assert (grammar and grammar.kind) == kind
    if kind in ("json_schema", "choice"):
        assert json.loads(grammar.text) == text
    elif kind:
        assert grammar.text == text


def test_the_official_client_asks_for_a_schema(gateway):
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
    gateway.openai().chat.completions.create(model="base", messages=USER, response_format=form, logit_bias={"5": 1})
    s = gateway.backend.requests[-1].sampling
    assert s.grammar.kind == "json_schema"
    assert dict(s.logit_bias) == {5: 1}


def test_what_the_engine_says_of_a_form_is_a_400(gateway):
    from pingjia.errors import RequestError

    gateway.backend.script = Script(
        raise_after=0, error=RequestError("guided_regex: cannot be met: no text fits it", param="guided_regex")
    )
    for stream in (False, True):
        response = gateway.chat(guided_regex="x", stream=stream)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "guided_regex")


def test_null_is_the_same_as_nothing(gateway):
    fields = (
        "temperature",
        "top_p",
        "top_k",
        "n",
        "stop",
        "seed",
        "max_tokens",
        "stream",
        "stream_options",
        "logprobs",
    )
    assert gateway.chat(**dict.fromkeys(fields)).status_code == 200
    s = gateway.backend.requests[-1].sampling
    assert (s.temperature, s.top_p, s.top_k, s.stop, s.seed, s.max_tokens) == (0.0, 1.0, 0, (), None, 512)


def test_top_k_minus_one_is_no_limit(gateway):
    assert gateway.chat(top_k=-1).status_code == 200
    assert gateway.backend.requests[-1].sampling.top_k == 0


def test_logprobs(gateway):
    answer = gateway.openai().chat.completions.create(model="base", messages=USER, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert "".join(t.token for t in content) == "你好, world"
    assert b"".join(bytes(t.bytes) for t in content).decode() == "你好, world"
    assert [t.token for t in content[:3]] == ["", "", "你"]  # one character, three tokens
    assert {t.logprob for t in content} == {-0.5}
    last = content[-1].top_logprobs
    assert [(t.token, t.logprob) for t in last] == [("d", -0.5), ("z", -9999.0)]


def test_logprobs_without_top(gateway):
    answer = gateway.openai().chat.completions.create(model="base", messages=USER, logprobs=True)
    assert gateway.backend.requests[-1].sampling.logprobs == 0
    assert {len(t.top_logprobs) for t in answer.choices[0].logprobs.content} == {0}


def test_streamed_logprobs(gateway):
    stream = gateway.openai().chat.completions.create(
        model="base", messages=USER, stream=True, logprobs=True, top_logprobs=1
    )
    tokens = [t for c in stream if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert "".join(t.token for t in tokens) == "你好, world"
    assert len(tokens) == 13


def test_text_parts_and_developer_role(gateway):
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    gateway.openai().chat.completions.create(model="base", messages=messages)
    prompt = gateway.tokenizer.decode(gateway.backend.requests[-1].prompt_ids)
    assert prompt == "system: Be brief.\nuser: hello\nassistant: "


def test_unknown_fields_are_ignored(gateway):
    assert gateway.chat(wholly_unknown=5, metadata={"a": "b"}, user="u1", store=False).status_code == 200


def test_adapter_is_chosen_by_model(gateway):
    client = gateway.openai()
    assert client.chat.completions.create(model="shop", messages=USER).model == "shop"
    client.chat.completions.create(model="base", messages=USER)
    assert [r.adapter for r in gateway.backend.requests] == ["shop", None]


def test_unknown_model(gateway):
    with pytest.raises(openai.NotFoundError) as e:
        gateway.openai().chat.completions.create(model="gpt-4", messages=USER)
    assert e.value.code == "model_not_found"
    assert "base, shop" in e.value.message
    assert e.value.param == "model"


def test_without_model_several_served_is_a_question(gateway):
    response = gateway.http.post("/v1/chat/completions", json={"messages": USER})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"
    assert "base, shop" in response.json()["error"]["message"]


def test_without_model_the_only_one_or_the_default_answers(start):
    alone = start()
    del alone.backend.cards[1]
    assert alone.http.post("/v1/chat/completions", json={"messages": USER}).json()["model"] == "base"
    named = start(default_model="shop")
    assert named.http.post("/v1/chat/completions", json={"messages": USER}).json()["model"] == "shop"
    assert named.backend.requests[-1].adapter == "shop"


def test_served_model_name_replaces_the_base_name(start):
    gateway = start(served_model_name="pingjia-6b")
    assert gateway.chat(model="pingjia-6b").json()["model"] == "pingjia-6b"
    assert gateway.backend.requests[-1].adapter is None
    assert gateway.chat(model="base").status_code == 404
    cards = gateway.http.get("/v1/models").json()["data"]
    assert [(c["id"], c["parent"]) for c in cards] == [("pingjia-6b", None), ("shop", "pingjia-6b")]


def test_prompt_and_answer_over_the_context_names_both_numbers(gateway):
    response = gateway.chat(max_tokens=4090)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    for number in (str(HI_TOKENS), "4090", str(HI_TOKENS + 4090), "4096", str(4096 - HI_TOKENS)):
        assert number in error["message"]
    assert gateway.backend.requests == []


def test_prompt_over_the_context(gateway):
    error = gateway.chat("x" * 5000).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "4096" in error["message"]
    assert str(HI_TOKENS - 2 + 5000) in error["message"]


def test_without_max_tokens_the_answer_gets_what_is_left(gateway):
    gateway.chat("x" * (4096 - HI_TOKENS + 2 - 10))
    assert gateway.backend.requests[-1].sampling.max_tokens == 10


def test_big_prompts_are_rendered_off_the_event_loop(gateway):
    gateway.tokenizer.threads.clear()
    gateway.chat("x")
    gateway.chat("x" * 20_000)
    small, big = gateway.tokenizer.threads
    assert big.startswith("render")
    assert not small.startswith("render")


def test_last_message_of_the_assistant_is_refused(gateway):
    messages = [*USER, {"role": "assistant", "content": "Well,"}]
    response = gateway.http.post("/v1/chat/completions", json={"model": "base", "messages": messages})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": "0.5"}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"model": 5}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_grammar": "root ::= x"}, "guided_grammar"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "x" * 70_000}, "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias.5"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_refused_naming_the_field(gateway, fields, param):
    response = gateway.http.post(
        "/v1/chat/completions",
        content=json.dumps({"model": "base", "messages": USER, **fields}),
        headers={"content-type": "application/json"},
    )
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert param.split("[")[0] in error["message"]
    assert gateway.backend.requests == []


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"logit_bias": {}},
        {"best_of": 1},
        {"temperature": 0},
        {"parallel_tool_calls": True},
    ],
)
def test_fields_that_ask_for_what_happens_anyway_are_taken(gateway, fields):
    assert gateway.chat(**fields).status_code == 200


def test_image_parts_are_refused_clearly(gateway):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    response = gateway.chat([{"type": "text", "text": "what is this?"}, image])
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages[0].content")
    assert "image_url" in error["message"]
    assert "only text" in error["message"]
