"""The gateway as two clients of this ecosystem see it: `openai` and `litellm`. Every call goes through both.

What the fields do is in the tests of each endpoint; here counts what a client makes of the answer.
"""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from gateway_fakes import Script

from pingjia.errors import Overloaded
from pingjia.gateway.keys import KeyFile

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else importing it asks the internet for prices
if importlib.util.find_spec("litellm") is not None:
    import litellm

    litellm.suppress_debug_info = True
else:
    litellm = None

USER = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": PARAMETERS}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
CALL = '{"name": "weather", "arguments": {"city": "北京"}}'


@dataclass
class Client:
    """One way to ask. `errors`: the module that has the exception classes."""

    chat: Callable[..., Any]
    complete: Callable[..., Any]
    errors: Any


def through_openai(url: str, key: str = "none") -> Client:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    return Client(
        lambda **fields: client.chat.completions.create(**{"model": "base", "messages": USER, **fields}),
        lambda **fields: client.completions.create(**{"model": "base", "prompt": "hi", **fields}),
        openai,
    )


def through_litellm(url: str, key: str = "none") -> Client:
    if litellm is None:
        pytest.skip("NOT TESTED: litellm is not installed; pip install 'pingjia[conformance]'")

    def with_road(ask: Callable[..., Any], road: str) -> Callable[..., Any]:
        def asked(model: str = "base", **fields: Any) -> Any:
            options = {"api_base": f"{url}/v1", "api_key": key, "max_retries": 0, "num_retries": 0}
            return ask(model=f"{road}/{model}", **options, **fields)

        return asked

    chat, complete = (
        with_road(litellm.completion, "openai"),
        with_road(litellm.text_completion, "text-completion-openai"),
    )
    return Client(
        lambda **fields: chat(**{"messages": USER, **fields}),
        lambda **fields: complete(**{"prompt": "hi", **fields}),
        litellm,
    )


CLIENTS = {"openai": through_openai, "litellm": through_litellm}


@pytest.fixture(params=list(CLIENTS))
def connect(request) -> Callable[..., Client]:
    return CLIENTS[request.param]


@pytest.fixture
def client(connect, gateway) -> Client:
    return connect(gateway.url)


def texts(stream: Iterator[Any]) -> tuple[str, str | None]:
    text, reason = "", None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason


# ---- chat


def test_a_chat(client):
    answer = client.chat()
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "你好, world", "stop")
    assert (answer.object, answer.usage.completion_tokens) == ("chat.completion", 13)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 13
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


def test_a_stream(client):
    assert texts(client.chat(stream=True)) == ("你好, world", "stop")
    chunks = list(client.chat(stream=True, stream_options={"include_usage": True}))
    assert [c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)] == [13]
    assert chunks[0].choices[0].delta.role == "assistant"


def test_sampling_reaches_the_engine(client, gateway):
    client.chat(temperature=0.5, top_p=0.9, seed=7, stop=["x"], max_tokens=9, frequency_penalty=0.1,
                presence_penalty=0.2, logit_bias={"5": 2},
                extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1})  # fmt: skip
    s = gateway.backend.requests[0].sampling
    assert (s.temperature, s.top_p, s.seed, s.stop, s.max_tokens) == (0.5, 0.9, 7, ("x",), 9)
    assert (s.frequency_penalty, s.presence_penalty, s.logit_bias) == (0.1, 0.2, ((5, 2.0),))
    assert (s.top_k, s.min_p, s.repetition_penalty) == (4, 0.1, 1.1)


def test_the_newer_name_of_the_limit(client):
    choice = client.chat(max_completion_tokens=3).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("你", "length")


def test_a_stop_string(client):
    assert client.chat(stop=", ").choices[0].message.content == "你好"


def test_several_answers(client, gateway):
    gateway.backend.script.text = lambda request: f"seed {request.sampling.seed}"
    assert [c.message.content for c in client.chat(n=2, seed=7).choices] == ["seed 7", "seed 8"]
    found: dict[int, str] = {}
    for chunk in client.chat(n=2, seed=7, stream=True):
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + (choice.delta.content or "")
    assert found == {0: "seed 7", 1: "seed 8"}


def test_log_probabilities(client):
    content = client.chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == "你好, world"
    assert {len(entry.top_logprobs) for entry in content} == {2}


def test_a_call_whole(client, gateway):
    gateway.backend.script.text = CALL
    choice = client.chat(tools=[WEATHER], tool_choice="auto").choices[0]
    call = choice.message.tool_calls[0]
    assert (choice.finish_reason, call.type, call.function.name) == ("tool_calls", "function", "weather")
    assert json.loads(call.function.arguments) == {"city": "北京"}
    history = [*USER, choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    gateway.backend.script.text = "It rains."
    assert client.chat(messages=history, tools=[WEATHER]).choices[0].message.content == "It rains."


def test_a_call_in_a_stream(client, gateway):
    gateway.backend.script.text = CALL
    arguments, names, reasons = "", [], []
    for chunk in client.chat(tools=[WEATHER], stream=True):
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or ():
                names += [call.function.name] if call.function.name else []
                arguments += call.function.arguments or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (names, json.loads(arguments), reasons) == (["weather"], {"city": "北京"}, ["tool_calls"])


def test_a_form_of_the_answer(client, gateway):
    gateway.backend.script.text = '{"city": "x"}'
    assert json.loads(client.chat(response_format=SCHEMA).choices[0].message.content) == {"city": "x"}
    assert json.loads(gateway.backend.requests[0].sampling.grammar.text) == PARAMETERS
    client.chat(response_format={"type": "json_object"})
    assert gateway.backend.requests[1].sampling.grammar.kind == "json_object"


def test_content_in_parts(client):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert client.chat(messages=[{"role": "user", "content": parts}]).choices[0].message.content == "你好, world"


def test_an_adapter_by_its_name(client, gateway):
    assert "shop" in client.chat(model="shop").model
    assert gateway.backend.requests[0].adapter == "shop"


def test_an_error_in_a_stream_is_an_exception(client, gateway):
    gateway.backend.script = Script(text="abcdef", raise_after=3)
    with pytest.raises(openai.APIError):  # litellm's are kinds of it
        texts(client.chat(stream=True))


# ---- raw text


def test_a_completion(client):
    answer = client.complete(max_tokens=3, logprobs=1)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("你", "length")
    assert answer.usage.completion_tokens == 3
    assert "".join(c.choices[0].text or "" for c in client.complete(stream=True) if c.choices) == "你好, world"


def test_several_prompts(client):
    assert len(client.complete(prompt=["a", "b"]).choices) == 2


# ---- errors


@pytest.mark.parametrize(
    ("fields", "name", "code"),
    [
        ({"model": "nobody"}, "NotFoundError", "model_not_found"),
        ({"extra_body": {"top_k": -5}}, "BadRequestError", None),
        ({"max_tokens": 4096}, "BadRequestError", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "BadRequestError", "invalid_value"),
    ],
)
def test_wrong_requests(client, fields, name, code):
    with pytest.raises(getattr(client.errors, name)) as caught:
        client.chat(**fields)
    if client.errors is openai:
        assert caught.value.code == code


def test_a_prompt_that_is_too_long_is_told_apart(connect, gateway):
    client = connect(gateway.url)
    kind = getattr(client.errors, "ContextWindowExceededError", client.errors.BadRequestError)
    with pytest.raises(kind, match="4096"):
        client.chat(messages=[{"role": "user", "content": "x" * 5000}])


def test_a_wrong_key(connect, start):
    client = connect(start(api_keys=("0" * 64,)).url, "sk-wrong")
    with pytest.raises(client.errors.AuthenticationError):
        client.chat()


def test_a_limit_of_the_key_says_when_to_come_back(connect, start, tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    secret = file.create("one", requests_per_minute=1).secret
    client = connect(start(keys_file=str(file.path)).url, secret)
    client.chat()
    with pytest.raises(client.errors.RateLimitError) as caught:
        client.chat()
    headers = getattr(caught.value, "litellm_response_headers", None) or caught.value.response.headers
    assert 1 <= int(headers["retry-after"]) <= 60


def test_too_much_at_once(client, gateway):
    gateway.backend.script = Script(raise_after=0, error=Overloaded("full", retry_after_s=3))
    kind = "ServiceUnavailableError" if client.errors is litellm else "InternalServerError"
    with pytest.raises(getattr(client.errors, kind)) as caught:
        client.chat()
    assert caught.value.status_code == 503


def test_a_deadline(connect, start):
    server = start(deadline_s=0.3)
    server.backend.script = Script(first_s=5)
    client = connect(server.url)
    kind = "Timeout" if client.errors is litellm else "InternalServerError"
    with pytest.raises(getattr(client.errors, kind)):
        client.chat()


def test_a_broken_engine(client, gateway):
    gateway.backend.script = Script(raise_after=0)
    with pytest.raises(client.errors.InternalServerError) as caught:
        client.chat()
    assert "secret" not in str(caught.value)


def test_openai_waits_as_told_and_asks_again(start, tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    secret = file.create("one", max_concurrent=1).secret
    server = start(keys_file=str(file.path), max_concurrent=1)
    server.backend.script = Script(first_s=0.4)
    client = server.openai(api_key=secret, max_retries=3)

    async def both() -> list[Any]:
        ask = client.chat.completions.create
        return await asyncio.gather(
            *(asyncio.to_thread(ask, model="base", messages=[{"role": "user", "content": c}]) for c in "ab")
        )

    assert [a.choices[0].finish_reason for a in asyncio.run(both())] == ["stop", "stop"]


# ---- the rest of the API, which litellm reaches through the official client


def test_models(gateway):
    client = gateway.openai()
    assert [(m.id, m.parent, m.root) for m in client.models.list()] == [
        ("base", None, "/models/base"),
        ("shop", "base", "/adapters/shop"),
    ]
    assert client.models.retrieve("shop").parent == "base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("x")


def test_files_and_batches(start, tmp_path, eventually):
    server = start(files_dir=str(tmp_path))
    client = server.openai()
    rows = [
        {"custom_id": f"q{i}", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": "base" if i else "nobody", "messages": USER, "tools": [WEATHER]}}
        for i in range(3)
    ]  # fmt: skip
    data = "\n".join(map(json.dumps, rows)).encode()
    file = client.files.create(file=("questions.jsonl", io.BytesIO(data)), purpose="batch")
    assert client.files.retrieve(file.id).bytes == len(data)
    assert client.files.content(file.id).content == data
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
    )
    eventually(lambda: client.batches.retrieve(batch.id).status == "completed", "the batch ends", 20)
    batch = client.batches.retrieve(batch.id)
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (3, 2, 1)
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert {a["custom_id"] for a in answers} == {"q1", "q2"}
    errors = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert (errors[0]["custom_id"], errors[0]["response"]["status_code"]) == ("q0", 404)
    assert [b.id for b in client.batches.list(limit=5)] == [batch.id]
    assert {f.id for f in client.files.list()} == {file.id, batch.output_file_id, batch.error_file_id}
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_" + "0" * 32)


def test_parsed_answers(gateway):
    """`parse` and the stream helper are what newer programs use."""
    from pydantic import BaseModel

    class City(BaseModel):
        city: str

    gateway.backend.script.text = '{"city": "北京"}'
    client = gateway.openai()
    answer = client.chat.completions.parse(model="base", messages=USER, response_format=City)
    assert answer.choices[0].message.parsed == City(city="北京")
    with client.chat.completions.stream(model="base", messages=USER, response_format=City) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == City(city="北京")
    gateway.backend.script.text = CALL
    with client.chat.completions.stream(model="base", messages=USER, tools=[WEATHER]) as stream:
        assert stream.get_final_completion().choices[0].message.tool_calls[0].function.name == "weather"


def test_an_async_client(gateway):
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(model="base", messages=USER, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == "你好, world"


def test_the_headers_a_client_reads(gateway):
    raw = gateway.openai().chat.completions.with_raw_response.create(
        model="base", messages=USER, extra_headers={"x-request-id": "mine-1"}
    )
    assert (raw.headers["x-request-id"], raw.request_id) == ("mine-1", "mine-1")
    assert raw.parse().choices[0].finish_reason == "stop"
