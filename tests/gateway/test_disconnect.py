"""A client that goes away stops the work it asked for."""

from __future__ import annotations

import json
import socket
import struct

import pytest
from gateway_fakes import Script

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
ENDLESS = Script(text="x" * 3000, token_s=0.002)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"stream": True, "n": 3}])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_the_backend_is_closed_when_the_client_goes(gateway, eventually, fields, how):
    gateway.backend.script = ENDLESS
    n = fields.get("n", 1)
    sock = gateway.raw("/v1/chat/completions", {**CHAT, **fields, "max_tokens": 2000})
    eventually(lambda: gateway.backend.num_tokens > 5 and gateway.backend.running == n, "tokens come")
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how == "half-close":
        sock.shutdown(socket.SHUT_WR)
    else:
        sock.close()
    eventually(lambda: len(gateway.backend.cancelled) == n, "cancelled")
    assert gateway.backend.running == 0
    made = gateway.backend.num_tokens
    assert made < 2000 * n
    sock.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/"])
def test_other_endpoints_too(gateway, eventually, path):
    gateway.backend.script = ENDLESS
    sock = gateway.raw(path, {"model": "base", "prompt": "x"})
    eventually(lambda: gateway.backend.running == 1, "it runs")
    sock.close()
    eventually(lambda: len(gateway.backend.cancelled) == 1, "cancelled")


def test_a_frozen_backend_lets_go(gateway, eventually):
    gateway.backend.script = Script(text="abc", freeze_after=1)
    sock = gateway.raw("/v1/chat/completions", {**CHAT, "stream": True})
    assert b"200 OK" in sock.recv(1000)
    sock.close()
    eventually(lambda: len(gateway.backend.cancelled) == 1, "cancelled")


def test_the_slot_is_given_back_and_the_fact_says_499(start, eventually, tmp_path):
    from pingjia.ledger import Ledger

    ledger = Ledger(tmp_path / "ledger.jsonl")
    gateway = start(ledger=ledger, max_concurrent=1)
    gateway.backend.script = ENDLESS
    sock = gateway.raw("/v1/chat/completions", CHAT)
    eventually(lambda: gateway.backend.num_tokens > 5, "tokens come")
    assert gateway.chat().status_code == 503
    sock.close()
    eventually(lambda: gateway.app.state.service.admission.in_work == 0, "the slot is free")
    gateway.backend.script = Script()
    assert gateway.chat().status_code == 200
    gone, answered = ledger.read(kind="serve.request")
    assert (gone.note["status"], gone.note["finish_reason"]) == (499, "cancelled")
    assert gone.completion_tokens > 5
    assert answered.note["status"] == 200
    assert 'pingjia_http_errors_total{status="499"} 1.0' in gateway.http.get("/metrics").text


def test_a_client_that_leaves_while_its_prompt_is_rendered(gateway, eventually):
    gateway.tokenizer.render_s = 0.3
    long = {**CHAT, "messages": [{"role": "user", "content": "x" * 9000}]}
    sock = gateway.raw("/v1/chat/completions", long)
    service = gateway.app.state.service
    eventually(lambda: service.admission.in_work == 1, "it was taken on")
    sock.close()
    eventually(lambda: service.admission.in_work == 0, "the slot is free")
    assert gateway.backend.requests == []


def test_a_client_that_stays_is_answered_once_and_can_ask_again(gateway):
    sock = gateway.raw("/v1/chat/completions", CHAT)
    data = json.dumps(CHAT).encode()
    first = b""
    while "你好" not in first.decode("utf-8", "ignore"):
        first += sock.recv(65536)
    sock.sendall(gateway.head("/v1/chat/completions", len(data)) + data)
    assert b"200 OK" in sock.recv(65536)
    sock.close()
    assert first.count(b"HTTP/1.1") == 1
    assert gateway.backend.cancelled == []
