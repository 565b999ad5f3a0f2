"""The gateway before other servers: what it sends them, what comes back, and that everything around it still holds."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pingjia.errors import UserError
from pingjia.gateway import GatewaySettings, create_app
from pingjia.gateway.upstream import Upstream
from pingjia.gateway.upstream_settings import UpstreamSettings
from pingjia.ledger import Ledger

_spec = importlib.util.spec_from_file_location("upstream_stub", Path(__file__).with_name("upstream_stub.py"))
assert _spec is not None
assert _spec.loader is not None
stubs = importlib.util.module_from_spec(_spec)
sys.modules["upstream_stub"] = stubs
_spec.loader.exec_module(stubs)
Act = stubs.Act

FAST = {"check_s": 0.05}


@pytest.fixture(scope="module")
def _stub() -> Iterator[Any]:
    stub = stubs.Stub()
    yield stub
    stub.stop()


@pytest.fixture
def stub(_stub: Any, eventually: Callable[..., None]) -> Iterator[Any]:
    _stub.act, _stub.seen, _stub.headers, _stub.num_left = Act(), [], [], 0
    _stub.health, _stub.max_running, _stub.pieces_sent = 200, 0, 0
    yield _stub
    _stub.act = Act()
    eventually(lambda: _stub.running == 0, "the server behind the gateway is idle after the test")


@pytest.fixture(scope="module")
def shared(_stub: Any, start_for_module: Callable[..., Any]) -> Any:
    return start_for_module(backend=Upstream(UpstreamSettings(servers=(_stub.url,), **FAST)))


def behind(start: Callable[..., Any], *servers: Any, upstream: Any = None, **settings: Any) -> Any:
    """A gateway before these."""
    given = {"servers": tuple(s if isinstance(s, dict) else s.url for s in servers), **FAST, **(upstream or {})}
    return start(backend=Upstream(UpstreamSettings(**given)), **settings)


def ask(gateway: Any, content: Any = "hi", **fields: Any) -> httpx.Response:
    body = {"model": "big", "messages": [{"role": "user", "content": content}], "temperature": 1.0, **fields}
    return gateway.http.post("/v1/chat/completions", json=body)


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ---- what comes back


def test_a_whole_answer(shared: Any, stub: Any) -> None:
    response = ask(shared)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["model"] == "big"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "你好, world"}
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == 11
    assert answer["usage"]["completion_tokens"] == 4


def test_a_stream_comes_piece_by_piece(shared: Any, stub: Any) -> None:
    found = events(ask(shared, stream=True, stream_options={"include_usage": True}))
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [e["choices"][0]["delta"].get("content") for e in found[1:5]] == ["你好", ", ", "wor", "ld"]
    assert found[5]["choices"][0]["finish_reason"] == "stop"
    assert found[6]["choices"] == []
    assert found[6]["usage"]["total_tokens"] == 15
    assert len({e["id"] for e in found}) == 1


def test_pieces_are_not_held_back(shared: Any, stub: Any) -> None:
    stub.act = Act(piece_s=0.3)
    started, first = time.monotonic(), None
    with shared.http.stream("POST", "/v1/chat/completions", json=_body(stream=True)) as response:
        for line in response.iter_lines():
            if "你好" in line and first is None:
                first = time.monotonic() - started
    assert first is not None
    assert first < time.monotonic() - started - 0.5


def test_usage_is_asked_for_whatever_the_client_wants(shared: Any, stub: Any) -> None:
    found = events(ask(shared, stream=True))
    assert stub.seen[-1]["stream_options"] == {"include_usage": True}
    assert all("usage" not in event for event in found)
    assert ask(shared).json()["usage"]["prompt_tokens"] == 11
    assert stub.seen[-1]["stream"] is True  # so that an answer nobody waits for ends at once


def test_a_server_that_counts_nothing_is_counted_for(shared: Any, stub: Any) -> None:
    stub.act = Act(usage=None)
    usage = ask(shared).json()["usage"]
    assert usage["completion_tokens"] == 4  # one for each piece
    assert usage["prompt_tokens"] > 0


def test_a_server_that_does_not_stream(shared: Any, stub: Any) -> None:
    message = {"role": "assistant", "content": "whole"}
    document = {"choices": [{"index": 0, "message": message, "finish_reason": "length"}]}
    stub.act = Act(whole=json.dumps({**document, "usage": {"prompt_tokens": 3, "completion_tokens": 1}}).encode())
    answer = ask(shared).json()
    assert answer["choices"][0]["message"]["content"] == "whole"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == 3
    assert events(ask(shared, stream=True))[1]["choices"][0]["delta"] == {"content": "whole"}


CALLS = (
    {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"q": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"茶"}'}}]},
    {"tool_calls": [{"index": 1, "id": "c2", "type": "function", "function": {"name": "buy", "arguments": "{}"}}]},
)
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def test_calls_of_tools_pass_through(shared: Any, stub: Any) -> None:
    stub.act = Act(deltas=CALLS, finish="tool_calls")
    found = events(ask(shared, stream=True, tools=TOOLS))
    assert [e["choices"][0]["delta"] for e in found[1:5]] == list(CALLS)
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert stub.seen[-1]["tools"] == TOOLS


def test_calls_of_tools_in_a_whole_answer(shared: Any, stub: Any) -> None:
    stub.act = Act(deltas=({"content": "I look."}, *CALLS), finish="tool_calls")
    choice = ask(shared, tools=TOOLS).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    assert choice["message"]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q": "茶"}'}},
        {"id": "c2", "type": "function", "function": {"name": "buy", "arguments": "{}"}},
    ]


def test_reasoning_and_logprobs_pass_through(shared: Any, stub: Any) -> None:
    one = {"content": [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []}]}
    deltas = ({"delta": {"reasoning_content": "hm"}}, {"delta": {"content": "a"}, "logprobs": one},
              {"delta": {"content": "a"}, "logprobs": one})  # fmt: skip
    stub.act = Act(deltas=deltas)
    found = events(ask(shared, stream=True, logprobs=True, top_logprobs=2))
    assert found[1]["choices"][0]["delta"] == {"reasoning_content": "hm"}
    assert found[2]["choices"][0]["logprobs"] == one
    choice = ask(shared, logprobs=True).json()["choices"][0]
    assert choice["message"]["reasoning_content"] == "hm"
    assert choice["message"]["content"] == "aa"
    assert len(choice["logprobs"]["content"]) == 2
    assert stub.seen[-1]["logprobs"] is True


def test_n_choices_are_asked_for_one_by_one_with_seeds(shared: Any, stub: Any) -> None:
    answer = ask(shared, n=3, seed=5).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert sorted(body["seed"] for body in stub.seen) == [5, 6, 7]
    assert all("n" not in body for body in stub.seen)
    assert answer["usage"]["prompt_tokens"] == 11  # one prompt, however often it was sent
    assert answer["usage"]["completion_tokens"] == 12


def test_completions_with_several_prompts(shared: Any, stub: Any) -> None:
    body = {"model": "big", "prompt": ["a", "b"], "echo": True, "temperature": 1, "max_tokens": 9}
    answer = shared.http.post("/v1/completions", json=body).json()
    assert [c["text"] for c in answer["choices"]] == ["你好, world"] * 2
    assert sorted(b["prompt"] for b in stub.seen) == ["a", "b"]
    assert stub.seen[0]["echo"] is True
    shared.http.post("/v1/completions", json={"model": "big", "prompt": [1, 2, 3], "temperature": 1})
    assert stub.seen[-1]["prompt"] == [1, 2, 3]


def test_the_demo_api(shared: Any, stub: Any) -> None:
    body = {"prompt": "b", "history": [["a", "A"]], "temperature": 0.5}
    assert shared.http.post("/", json=body).json()["response"] == "你好, world"
    said = [(m["role"], m["content"]) for m in stub.seen[-1]["messages"]]
    assert said == [("user", "a"), ("assistant", "A"), ("user", "b")]
    assert stub.seen[-1]["top_p"] == 0.7
    assert 1900 < stub.seen[-1]["max_tokens"] < 2048


def test_the_openai_client(shared: Any, stub: Any) -> None:
    client = shared.openai()
    question: Any = [{"role": "user", "content": "hi"}]
    pieces = client.chat.completions.create(model="big", messages=question, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == "你好, world"
    stub.act = Act(deltas=CALLS, finish="tool_calls")
    message = client.chat.completions.create(model="big", messages=question, tools=TOOLS).choices[0].message
    assert message.tool_calls[0].function.name == "look"


# ---- what is sent


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": "big", "messages": [{"role": "user", "content": "hi"}], "temperature": 1.0, **fields}


def test_everything_a_client_says_is_passed_on(shared: Any, stub: Any) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [
        {"role": "developer", "content": "short"},
        {"role": "user", "content": [{"type": "text", "text": "what"}, picture]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "type": "function",
                                                               "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "x", "content": "1"},
    ]  # fmt: skip
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "top_k": 7, "guided_choice": ["a", "b"], "user": "u"}
    response = shared.http.post("/v1/chat/completions", json=_body(messages=messages, stop=["x"], **extra))
    assert response.status_code == 200
    assert stub.seen[-1]["messages"] == messages
    assert {k: stub.seen[-1][k] for k in extra} == extra
    assert stub.seen[-1]["stop"] == ["x"]


def test_the_servers_own_limits_are_its_own_to_say(shared: Any, stub: Any) -> None:
    error = {"message": "maximum context length is 4096 tokens", "param": "messages", "code": "context_length_exceeded"}
    stub.act = Act(status=400, error={"error": error})
    response = ask(shared, max_tokens=1_000_000)
    assert response.status_code == 400
    assert response.json()["error"] == {**error, "type": "invalid_request_error"}
    assert stub.seen[-1]["max_tokens"] == 1_000_000


def test_without_max_tokens_the_default_is_sent_under_the_name_the_client_uses(shared: Any, stub: Any) -> None:
    ask(shared)
    assert stub.seen[-1]["max_tokens"] == 512
    ask(shared, max_completion_tokens=9)
    assert stub.seen[-1]["max_completion_tokens"] == 9
    assert "max_tokens" not in stub.seen[-1]


def test_a_prompt_that_may_fill_the_context_is_counted_by_the_server(start: Callable[..., Any], stub: Any) -> None:
    gateway = behind(start, stub)
    ask(gateway, "x" * 11_400)  # 3,200 tokens by the estimate, 3,800 by the stub's count, of 4,096
    assert stub.seen[-1]["max_tokens"] == 296


def test_the_servers_are_in_the_metrics(shared: Any, stub: Any) -> None:
    ask(shared)
    metrics = shared.http.get("/metrics").text
    assert f'pingjia_upstream_ready{{server="{stub.url}"}} 1.0' in metrics
    assert f'pingjia_upstream_running{{server="{stub.url}"}} 0.0' in metrics


def test_no_temperature_means_the_gateways_default(shared: Any, stub: Any) -> None:
    shared.http.post("/v1/completions", json={"model": "big", "prompt": "warm"})
    assert stub.seen[-1]["temperature"] == 0.0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": "hi"}, "messages"),
        ({"temperature": "1"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"model": "small"}, "model"),
    ],
)
def test_what_the_gateway_itself_must_understand_is_checked(shared: Any, stub: Any, fields: Any, param: str) -> None:
    response = shared.http.post("/v1/chat/completions", json=_body(**fields))
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param
    assert stub.seen == []


def test_the_key_is_sent_and_never_shown(
    start: Callable[..., Any], stub: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STUB_KEY", "sk-very-secret")
    gateway = behind(start, {"url": stub.url, "api_key_env": "STUB_KEY"})
    stub.act = Act(status=400, error={"error": {"message": "key sk-very-secret is bad"}})
    response = ask(gateway)
    assert stub.headers[-1]["Authorization"] == "Bearer sk-very-secret"
    assert "sk-very-secret" not in response.text
    stub.act = Act(status=401, error={"error": {"message": "key sk-very-secret is bad"}})
    response = ask(gateway)
    assert response.status_code == 502  # the client's own key is good
    assert "sk-very-secret" not in response.text + caplog.text


def test_a_clients_key_is_not_passed_on(start: Callable[..., Any], stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINGJIA_API_KEYS", "sk-mine")
    gateway = behind(start, stub)
    gateway.http.headers["authorization"] = "Bearer sk-mine"
    assert ask(gateway).status_code == 200
    assert all("Authorization" not in headers for headers in stub.headers)


@pytest.mark.parametrize(
    ("servers", "said"),
    [
        (("ftp://x/v1",), "not an http"),
        (("http://a/v1", "http://a/v1"), "given twice"),
        (({"url": "http://a/v1", "api_key_env": "NO_SUCH_VARIABLE"},), "no such environment variable"),
    ],
)
def test_bad_settings_are_refused_at_once(servers: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Upstream(UpstreamSettings(servers=servers))


def test_a_url_alone_will_do() -> None:
    one = GatewaySettings.model_validate({"upstream": "http://a/v1"}).upstream
    assert [server.url for server in one.servers] == ["http://a/v1"]
    two = GatewaySettings.model_validate({"upstream": ["http://a/v1", {"url": "http://b/v1", "weight": 2}]}).upstream
    assert [server.weight for server in two.servers] == [1.0, 2.0]


# ---- what stands around it


def test_models_are_those_of_the_servers_under_the_names_given(start: Callable[..., Any], stub: Any) -> None:
    other = stubs.Stub([{"id": "theirs"}, {"id": "lora", "parent": "theirs", "root": "/loras/1"}, {"id": "no"}])
    try:
        gateway = behind(start, stub, {"url": other.url, "models": {"mine": "theirs", "shop": "lora"}})
        cards = {card["id"]: card for card in gateway.http.get("/v1/models").json()["data"]}
        assert set(cards) == {"big", "mine", "shop"}
        assert cards["big"]["max_model_len"] == 4096
        assert cards["shop"]["parent"] == "mine"
        assert cards["shop"]["root"] == "/loras/1"
        assert ask(gateway, model="shop").status_code == 200
        assert other.seen[-1]["model"] == "lora"
        assert ask(gateway, model="no").json()["error"]["code"] == "model_not_found"
    finally:
        other.stop()


def test_equal_questions_are_kept_and_every_field_tells_questions_apart(start: Callable[..., Any], stub: Any) -> None:
    gateway = behind(start, stub)
    assert ask(gateway, temperature=0).headers["x-cache"] == "MISS"
    hit = ask(gateway, temperature=0)
    assert hit.headers["x-cache"] == "HIT"
    assert hit.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 11
    for fields in ({"top_k": 3}, {"guided_choice": ["a"]}, {"max_tokens": 5}, {"chat_template_kwargs": {"x": 1}},
                   {"seed": 1}, {"tools": TOOLS}, {"nobody_knows": 1}):  # fmt: skip
        assert ask(gateway, temperature=0, **fields).headers["x-cache"] == "MISS", fields
    assert ask(gateway, "hj", temperature=0).headers["x-cache"] == "MISS"
    assert ask(gateway, temperature=1).headers["x-cache"] == "BYPASS"
    assert ask(gateway, temperature=0, stream=True).headers.get("x-cache") == "HIT"


def test_a_kept_answer_with_calls_is_given_again_whole_and_streamed(start: Callable[..., Any], stub: Any) -> None:
    gateway = behind(start, stub)
    stub.act = Act(deltas=CALLS, finish="tool_calls")
    first = ask(gateway, temperature=0, tools=TOOLS).json()
    stub.act = Act()
    again = ask(gateway, temperature=0, tools=TOOLS)
    assert again.headers["x-cache"] == "HIT"
    assert again.json()["choices"] == first["choices"]
    found = events(ask(gateway, temperature=0, tools=TOOLS, stream=True))
    assert [e["choices"][0]["delta"] for e in found[1:5]] == list(CALLS)


def test_a_revision_makes_kept_answers_unfindable(stub: Any) -> None:
    def digest(**settings: Any) -> str:
        upstream = Upstream(UpstreamSettings(servers=(stub.url,), **settings))
        upstream.servers[0].models = stubs_models()
        upstream.servers[0].is_well = True
        return upstream.models()[0].digest

    assert digest() == digest() != digest(revision="2")


def stubs_models(**fields: Any) -> Any:
    from pingjia.gateway.upstream_server import served_models

    row = {"id": "big", "created": time.time_ns(), "permission": [time.time_ns()], **fields}
    return served_models(json.dumps({"data": [row]}).encode(), {})


def test_servers_that_tell_different_things_of_a_model_share_no_kept_answers() -> None:
    upstream = Upstream(UpstreamSettings(servers=("http://a/v1", "http://b/v1")))
    for server, root in zip(upstream.servers, ("q4", "q8"), strict=True):
        server.models, server.is_well = stubs_models(root=root), True
    assert upstream.models()[0].digest == ""
    upstream.servers[1].models = stubs_models(root="q4")
    assert upstream.models()[0].digest


def test_the_queue_limits_languages_and_ledger_hold(start: Callable[..., Any], stub: Any, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    rules = {"zh": {"system": "用中文"}, "fr": {"refuse": "non"}}
    gateway = behind(start, stub, ledger=ledger, queue_above_rps=0, language={"rules": rules})
    response = ask(gateway, "你好吗，今天天气怎么样")
    assert response.headers["x-language"] == "zh"
    assert stub.seen[-1]["messages"][0] == {"role": "system", "content": "用中文"}
    refused = ask(gateway, "Bonjour, je voudrais savoir quand ma commande arrive à la maison")
    assert refused.json()["choices"][0]["message"]["content"] == "non"
    facts = [fact for fact in ledger.read() if fact.kind == "serve.request"]
    assert [(fact.prompt_tokens, fact.completion_tokens) for fact in facts][:1] == [(11, 4)]
    assert 'road_requests_total{road="queue"} 1.0' in gateway.http.get("/metrics").text


def test_calls_pass_through_the_queue_too(start: Callable[..., Any], stub: Any) -> None:
    gateway = behind(start, stub, queue_above_rps=0)
    stub.act = Act(deltas=CALLS, finish="tool_calls")
    assert ask(gateway).json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "look"
    stub.act = Act(status=429, error={"error": {"message": "slow down"}}, headers={"retry-after": "7"})
    response = ask(gateway)
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")


def test_all_of_it_over_redis(start: Callable[..., Any], stub: Any, redis: Any) -> None:
    one = behind(start, stub, redis_url=redis.url, queue_above_rps=0)
    two = behind(start, stub, redis_url=redis.url, queue_above_rps=0)
    stub.act = Act(deltas=CALLS, finish="tool_calls")
    found = events(ask(one, temperature=0, tools=TOOLS, stream=True))
    assert [e["choices"][0]["delta"] for e in found[1:5]] == list(CALLS)
    assert stub.seen[-1]["tools"] == TOOLS
    kept = ask(two, temperature=0, tools=TOOLS)
    assert kept.headers["x-cache"] == "HIT"
    assert kept.json()["choices"][0]["message"]["tool_calls"][1]["id"] == "c2"
    stub.act = Act(status=503, error={"error": {"message": "full"}}, headers={"retry-after": "9"})
    busy = ask(two)
    assert (busy.status_code, busy.headers["retry-after"]) == (503, "9")


def test_jobs_and_batches(
    start: Callable[..., Any], stub: Any, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    gateway = behind(start, stub, files_dir=str(tmp_path))
    stub.act = Act(deltas=CALLS, finish="tool_calls")
    accepted = gateway.http.post("/v1/chat/completions", json=_body(tools=TOOLS), headers={"prefer": "respond-async"})
    assert accepted.status_code == 202
    job = accepted.headers["location"]
    eventually(lambda: gateway.http.get(job).json()["status"] == "completed", "the job is done")
    choice = gateway.http.get(job).json()["result"]["choices"][0]
    assert choice["message"]["tool_calls"][1]["id"] == "c2"
    stub.act = Act()
    client = gateway.openai()
    rows = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": _body(seed=i)} for i in (1, 2)
    ]
    data = "\n".join(map(json.dumps, rows)).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    eventually(lambda: client.batches.retrieve(batch.id).status == "completed", "the batch is done", 15)
    out = client.files.content(client.batches.retrieve(batch.id).output_file_id).text.splitlines()
    texts = [json.loads(line)["response"]["body"]["choices"][0]["message"]["content"] for line in out]
    assert texts == ["你好, world"] * 2


def test_a_keys_tokens_are_corrected_by_what_the_server_counted(
    start: Callable[..., Any], stub: Any, tmp_path: Path
) -> None:
    from pingjia.gateway.keys import KeyFile

    file = KeyFile(str(tmp_path / "keys.json"))
    secret = file.create("alice", tokens_per_minute=700).secret
    gateway = behind(start, stub, keys_file=str(tmp_path / "keys.json"))
    gateway.http.headers["authorization"] = f"Bearer {secret}"
    for _ in range(4):  # each reserves 512 and more, and gives back what it did not take
        assert ask(gateway).status_code == 200


def test_the_document_says_what_is_taken(shared: Any, stub: Any) -> None:
    document = shared.http.get("/openapi.json").json()
    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["$ref"].endswith("PassedChatBody")


async def test_token_ids_are_not_to_be_had(stub: Any) -> None:
    app = create_app(Upstream(UpstreamSettings(servers=(stub.url,))), None, GatewaySettings(port=0))
    upstream = app.state.service.upstream
    await upstream.start()
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
                response = await client.post(path, json=body)
                assert response.status_code == 400
                assert "no tokenizer" in response.json()["error"]["message"]
    finally:
        await upstream.stop()


def test_an_openai_error_is_raised_for_a_lost_server(
    start: Callable[..., Any], eventually: Callable[..., None]
) -> None:
    gateway = behind(start, {"url": "http://127.0.0.1:9/v1"})
    with pytest.raises(openai.APIStatusError) as caught:
        gateway.openai().chat.completions.create(model="big", messages=[{"role": "user", "content": "x"}])
    assert caught.value.status_code == 503
    assert gateway.http.get("/health/ready").status_code == 503
