"""The bytes of an event stream, and how streams end."""

from __future__ import annotations

import json

import pytest
from gateway_fakes import Script

from pingjia.errors import EngineError, ModelNotFound, Overloaded


def read_events(gateway, **fields):
    """(response, lines without blanks) of a streamed chat."""
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
    with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
        return response, [line for line in response.iter_lines() if line]


def test_bytes_and_headers(gateway):
    gateway.backend.script = Script(text="ab")
    response, lines = read_events(gateway)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-request-id"]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    choices = [{"index": 0, "logprobs": None, "finish_reason": None} for _ in range(4)]
    deltas = [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}]
    choices[3]["finish_reason"] = "stop"
    assert [e["choices"] for e in events] == [[c | {"delta": d}] for c, d in zip(choices, deltas, strict=True)]
    assert all("usage" not in e for e in events)


def test_usage_is_null_until_the_last_event(gateway):
    gateway.backend.script = Script(text="ab")
    _, lines = read_events(gateway, stream_options={"include_usage": True})
    usages = [json.loads(line[6:])["usage"] for line in lines[:-1]]
    assert usages[:-1] == [None] * 4
    assert usages[-1]["completion_tokens"] == 2


def test_half_characters_are_never_sent(gateway):
    gateway.backend.script = Script(text="平价🙂")
    _, lines = read_events(gateway)
    contents = [json.loads(line[6:])["choices"][0]["delta"].get("content") for line in lines[:-1]]
    assert [c for c in contents if c] == ["平", "价", "🙂"]


def test_ping_while_nothing_comes(gateway):
    gateway.backend.script = Script(text="ab", first_s=0.5)  # the fixture pings after 0.2 s
    _, lines = read_events(gateway)
    assert lines[0] == ": ping"
    assert lines[-1] == "data: [DONE]"


def test_ping_between_tokens(gateway):
    gateway.backend.script = Script(text="ab", token_s=0.3)
    _, lines = read_events(gateway)
    assert lines.count(": ping") >= 1
    assert lines.index("data: [DONE]") == len(lines) - 1


@pytest.mark.parametrize("n", [1, 3])
def test_an_error_in_mid_stream_is_an_event_and_then_done(gateway, n):
    gateway.backend.script = Script(text="abcdef", raise_after=3, error=EngineError("step 7 failed: out of memory"))
    response, lines = read_events(gateway, n=n)
    assert response.status_code == 200
    assert lines[-1] == "data: [DONE]"
    error = json.loads(lines[-2].removeprefix("data: "))["error"]
    assert (error["code"], error["message"]) == ("engine_error", "step 7 failed: out of memory")
    assert sum("finish_reason" in line and '"stop"' in line for line in lines) == 0


def test_openai_client_raises_the_error_in_mid_stream(gateway):
    import openai

    gateway.backend.script = Script(text="abcdef", raise_after=3, error=EngineError("out of memory"))
    got = []
    with pytest.raises(openai.APIError, match="out of memory"):
        got.extend(
            gateway.openai().chat.completions.create(
                model="base", messages=[{"role": "user", "content": "hi"}], stream=True
            )
        )
    assert "".join(c.choices[0].delta.content for c in got) == "abc"


def test_foreign_exceptions_keep_their_text_to_the_log(gateway, caplog):
    gateway.backend.script = Script(text="abc", raise_after=1)
    _, lines = read_events(gateway)
    assert "secret detail" not in "".join(lines)
    assert "secret detail" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (EngineError("broken"), 500),
        (Overloaded("full", retry_after_s=2.2), 503),
        (ModelNotFound("the adapter was just unloaded"), 404),
        (RuntimeError("secret detail"), 500),
    ],
)
def test_an_error_before_the_first_token_has_a_status(gateway, error, status):
    gateway.backend.script = Script(raise_after=0, error=error)
    response, lines = read_events(gateway)
    assert response.status_code == status
    assert "secret" not in "".join(lines)
    assert json.loads(lines[0])["error"]["message"]
    if status == 503:
        assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize("script", [Script(finish="error", error_text="NaN in the logits"), Script(end_after=2)])
def test_answers_that_do_not_end_well_are_errors(gateway, script):
    gateway.backend.script = script
    whole = gateway.chat()
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "engine_error")
    _, lines = read_events(gateway)
    assert json.loads(lines[-2][6:])["error"]["message"] == whole.json()["error"]["message"]
    assert lines[-1] == "data: [DONE]"


def test_an_answer_the_server_cancelled_is_503(gateway):
    gateway.backend.script = Script(finish="cancelled")
    response = gateway.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "cancelled")
    _, lines = read_events(gateway)
    assert json.loads(lines[-2][6:])["error"]["code"] == "cancelled"


def test_one_failing_choice_stops_the_others(gateway, eventually):
    def text(request):
        return "x" if request.id.endswith("-0") else "y" * 200

    gateway.backend.script = Script(text=text, token_s=0.01, finish="error")
    assert gateway.chat(n=2).status_code == 500
    eventually(lambda: len(gateway.backend.cancelled) == 1, "the other choice is cancelled")
    assert gateway.backend.cancelled[0].endswith("-1")
