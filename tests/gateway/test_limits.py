"""What is too large, too slow, too much or too late."""

from __future__ import annotations

import json
import socket
import threading
import time

import openai
import pytest
from gateway_fakes import Script

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}


def exchange(gateway, *parts: bytes) -> bytes:
    """Send raw parts, read until the server closes."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as sock:
        for part in parts:
            sock.sendall(part)
        received = b""
        while data := sock.recv(65536):
            received += data
        return received


def test_a_large_declared_body_is_413(start):
    gateway = start(max_body_bytes=1000)
    response = gateway.chat("x" * 1000)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (413, "body_too_large")
    assert "1000" in error["message"]
    assert gateway.chat("x" * 100).status_code == 200


def test_a_large_streamed_body_is_413(start):
    gateway = start(max_body_bytes=1000)
    response = gateway.http.post(
        "/v1/chat/completions", content=(b"x" * 100 for _ in range(50)), headers={"content-type": "application/json"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_streamed_body_within_the_limit_is_read(gateway):
    data = json.dumps(CHAT).encode()
    response = gateway.http.post(
        "/v1/chat/completions",
        content=(data[i : i + 7] for i in range(0, len(data), 7)),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 200


def test_a_slow_body_is_408_and_the_connection_closes(start):
    gateway = start(body_s=0.3)
    received = exchange(gateway, gateway.head("/v1/completions", 500), b'{"model"')
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in received
    assert b"8 bytes came" in received


@pytest.mark.parametrize("parts", [(), (b"POST / HTTP/1.1\r\nHost: x\r\n",)])
def test_a_slow_head_closes_the_connection(start, parts):
    gateway = start(head_s=0.3)
    assert exchange(gateway, *parts) == b""


def test_a_slow_second_head_on_a_kept_connection_closes_it_too(start):
    gateway = start(head_s=0.3)
    get = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    received = exchange(gateway, get, b"GET /hea")
    assert received.count(b"200 OK") == 1


def test_the_head_timer_does_not_touch_a_long_answer(start):
    gateway = start(head_s=0.2)
    gateway.backend.script = Script(text="ab", first_s=0.5)
    assert gateway.chat().status_code == 200


@pytest.mark.parametrize("head", [b"NONSENSE\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n"])
def test_malformed_heads_are_400(gateway, head):
    assert exchange(gateway, head).startswith(b"HTTP/1.1 400 ")


def test_overload_is_503_with_a_measured_retry_after(start, eventually):
    gateway = start(max_concurrent=2)
    gateway.backend.script = Script(text="ok", held=True)
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(gateway.chat().status_code)) for _ in range(2)]
    for thread in threads:
        thread.start()
    eventually(lambda: gateway.backend.running == 2, "both run")
    refused = gateway.chat()
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (503, "overloaded")
    assert "limit is 2" in error["message"]
    assert refused.headers["retry-after"] == "1"
    gateway.backend.script.held = False
    for thread in threads:
        thread.join()
    assert results == [200, 200]
    assert gateway.chat().status_code == 200
    assert gateway.app.state.service.admission.mean_s > 0


def test_a_request_takes_as_many_slots_as_it_has_choices(start):
    gateway = start(max_concurrent=3)
    assert gateway.chat(n=3).status_code == 200
    assert gateway.chat(n=4).json()["error"]["param"] == "n"
    assert gateway.app.state.service.admission.in_work == 0


def test_openai_client_waits_and_comes_back(start, eventually):
    gateway = start(max_concurrent=1)
    gateway.backend.script = Script(text="ok", held=True)
    answers: list[str] = []

    def ask():
        answer = gateway.openai(max_retries=5).chat.completions.create(**CHAT)
        answers.append(answer.choices[0].message.content)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    eventually(lambda: 'http_errors_total{status="503"}' in gateway.http.get("/metrics").text, "one was refused")
    gateway.backend.script.held = False
    for thread in threads:
        thread.join()
    assert answers == ["ok", "ok"]
    assert len(gateway.backend.requests) == 2


def test_the_deadline_ends_a_whole_answer_with_504(start, eventually):
    gateway = start(deadline_s=0.3)
    gateway.backend.script = Script(text="abc", freeze_after=1)
    response = gateway.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert response.headers["x-should-retry"] == "false"
    eventually(lambda: len(gateway.backend.cancelled) == 1, "cancelled")
    with pytest.raises(openai.InternalServerError):
        gateway.openai(max_retries=2).chat.completions.create(**CHAT)
    assert len(gateway.backend.requests) == 2  # the client did not ask three times


def test_the_deadline_ends_a_steady_stream_too(start, eventually):
    gateway = start(deadline_s=0.8)
    gateway.backend.script = Script(text="x" * 3000, token_s=0.001)
    with gateway.http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True, "max_tokens": 3000}) as r:
        lines = [line for line in r.iter_lines() if line]
    assert r.status_code == 200
    assert json.loads(lines[-2][6:])["error"]["code"] == "deadline_exceeded"
    assert lines[-1] == "data: [DONE]"
    eventually(lambda: len(gateway.backend.cancelled) == 1, "cancelled")


def test_not_ready_is_503_at_once(gateway):
    gateway.backend.ready = False
    response = gateway.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert gateway.backend.requests == []


def test_one_connection_too_many_is_told_so(start) -> None:
    gateway = start(max_connections=2)
    idle = [socket.create_connection(("127.0.0.1", gateway.port), timeout=5) for _ in range(2)]
    try:
        for one in idle:  # both are there: they answer
            one.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
            assert one.recv(1000).startswith(b"HTTP/1.1 200")
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as late:
            said = b"".join(iter(lambda: late.recv(1000), b""))
        assert said.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in said
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "overloaded"
    finally:
        for one in idle:
            one.close()
    until = time.monotonic() + 5
    while (status := gateway.chat().status_code) != 200 and time.monotonic() < until:
        time.sleep(0.05)
    assert status == 200  # there is room again
