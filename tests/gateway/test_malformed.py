"""10,000 bodies that are nearly right, and what is hardly HTTP: never a 500, never a hang, always the envelope.

The bodies go straight into the application, so that so many take seconds; what is said on a socket goes to a real one.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gateway_fakes import ByteTokenizer, FakeBackend

from pingjia.gateway import GatewaySettings, create_app

NUM = 10_000
MESSAGES = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": [{"type": "text", "text": "b"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "c", "content": "d"},
    {"role": "user", "content": "e"},
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "base", "messages": MESSAGES, "tools": [TOOL], "tool_choice": "auto", "temperature": 0.5, "top_p": 0.9,
        "n": 1, "max_tokens": 2, "seed": 1, "stop": ["a"], "stream": True, "stream_options": {"include_usage": True},
        "logprobs": True, "top_logprobs": 1, "logit_bias": {"5": 1.0}, "user": "u", "metadata": {"a": "b"},
    },
    "/v1/completions": {
        "model": "base", "prompt": ["x", "y"], "temperature": 0.5, "logprobs": 1, "n": 1, "max_tokens": 2, "seed": 3,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
    },
    "/": {"prompt": "x", "history": [["a", "b"]], "max_length": 100, "top_p": 0.5, "temperature": 0.5, "model": "base"},
    "/tokenize": {"model": "base", "messages": MESSAGES, "tools": [TOOL], "add_generation_prompt": True},
    "/detokenize": {"model": "base", "tokens": [5, 6, 7]},
    "/v1/batches": {"input_file_id": "file-0", "endpoint": "/v1/completions", "completion_window": "24h"},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "b"},
    "/v1/unload_lora_adapter": {"lora_name": "a"},
}  # fmt: skip
_ODD = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 1e308, -0.0, 0.1, "", "x", "\ud800", "\0", "0.5",
    "A" * 3000, [], [[]], {}, {"": None}, [None], ["\udfff"], {"\ud800": 1}, "null", "[DONE]", "data: x\n\n", "🙂" * 50,
)  # fmt: skip
_DEEP = 100_000


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be put in place of what is there."""
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(child, (*path, key))


def other_values(rng: random.Random, body: dict[str, Any]) -> bytes:
    """One to three values are others."""
    for _ in range(rng.randint(1, 3)):
        *path, last = rng.choice(list(places(body)))
        node = body
        for key in path:
            node = node[key]
        node[last] = copy.deepcopy(rng.choice(_ODD))
    return json.dumps(body).encode()


def other_keys(rng: random.Random, body: dict[str, Any]) -> bytes:
    """Keys that are missing, unknown, or there twice."""
    key = rng.choice(list(body))
    kind = rng.randrange(3)
    if kind == 0:
        del body[key]
        return json.dumps(body).encode()
    if kind == 1:
        return json.dumps(
            {**body, rng.choice(("__proto__", "\ud800", "", "model ", "best_of")): rng.choice(_ODD)}
        ).encode()
    twice = json.dumps({key: rng.choice(_ODD)})[1:-1]
    return json.dumps(body).encode()[:-1] + b", " + twice.encode() + b"}"


def cut_short(rng: random.Random, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return data[: rng.randrange(len(data))]


def other_bytes(rng: random.Random, body: dict[str, Any]) -> bytes:
    """Invalid UTF-8, and whatever else comes of bytes that change."""
    data = bytearray(json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(data)


def other_numbers(rng: random.Random, body: dict[str, Any]) -> bytes:
    """Numbers that JSON does not have, and some that nobody can hold."""
    odd = rng.choice(
        ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000, "0x1", "01", "1.", "--1", "1e-999")
    )
    *path, last = rng.choice(list(places(body)))
    node = body
    for key in path:
        node = node[key]
    node[last] = "@@"
    return json.dumps(body).replace('"@@"', odd).encode()


def nested(rng: random.Random, body: dict[str, Any]) -> bytes:
    """Deeper than any stack."""
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    depth = rng.choice((50, 1000, _DEEP // len(opening)))
    deep = opening * depth + "1" * (opening != "[") + closing * depth
    key = rng.choice(list(body))
    return json.dumps({**body, key: "@@"}).replace('"@@"', deep).encode()


def other_encodings(rng: random.Random, body: dict[str, Any]) -> bytes:
    text = json.dumps(body)
    return rng.choice((
        text.encode("utf-16"), text.encode("utf-32"), b"\xef\xbb\xbf" + text.encode(), text.encode() + b"\0",
        b"", b"null", b"[]", b'"x"', b"1", text.encode() * 2, b"a=b&c=d", b"\xff\xfe",
    ))  # fmt: skip


HOW: dict[Callable[[random.Random, dict[str, Any]], bytes], int] = {
    other_values: 50, other_keys: 15, cut_short: 8, other_bytes: 12, other_numbers: 10, nested: 1, other_encodings: 4,
}  # fmt: skip
KINDS = (
    *("application/json",) * 20, "application/json; charset=utf-16", "text/plain", "", "multipart/form-data",
    "application/x-www-form-urlencoded", "application/vnd.a+json", "APPLICATION/JSON;;", "\x80",
)  # fmt: skip


async def post(app: Any, path: str, data: bytes, kind: str) -> tuple[int, bytes]:
    """Status and body, without a socket in between."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2), "headers": [(b"content-type", kind.encode("latin-1"))], "state": {},
    }  # fmt: skip
    given, status, body = False, 0, b""

    async def receive() -> dict[str, Any]:
        nonlocal given
        if given:
            await asyncio.Event().wait()
        given = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, body
        status = message.get("status", status)
        body += message.get("body", b"")

    async with asyncio.timeout(10):
        await app(scope, receive, send)
    return status, body


def wrong_about(status: int, body: bytes, kind: str) -> str:
    """What an answer should not be; empty when it is right."""
    if status == 200:
        return ""
    if status not in (400, 404, 415):
        return f"status {status}"
    if status == 415 and kind.startswith("application/json"):
        return "415 for JSON"
    error = json.loads(body)["error"]
    return "" if set(error) == {"message", "type", "param", "code"} and error["message"] else "no envelope"


async def test_ten_thousand_bodies_that_are_nearly_right(tmp_path, caplog):
    app = create_app(FakeBackend(), ByteTokenizer(), GatewaySettings(port=0, files_dir=str(tmp_path)))
    rng, statuses, wrong = random.Random(7), Counter[int](), []
    with caplog.at_level(logging.ERROR):
        async with app.router.lifespan_context(app):
            for _ in range(NUM):
                path = rng.choices(list(BODIES), [8, 5, 3, 2, 1, 1, 1, 1])[0]
                data = rng.choices(list(HOW), list(HOW.values()))[0](rng, copy.deepcopy(BODIES[path]))
                kind = rng.choice(KINDS)
                status, body = await post(app, path, data, kind)
                statuses[status] += 1
                if why := wrong_about(status, body, kind):
                    wrong.append((why, path, data[:200], body[:300]))
    assert wrong == []
    assert [r for r in caplog.records if r.exc_info] == []
    assert min(statuses[s] for s in (200, 400, 404, 415)) > 50, statuses


# ---- on a socket

GOOD = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
JSON = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = b'{"model":"base","prompt":"x","max_tokens":1}'


def exchange(port: int, *parts: bytes, pause_s: float = 0.0, half_close: bool = False) -> bytes:
    """Send these, then read until the server closes or has nothing more to say."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        for part in parts:
            try:
                sock.sendall(part)
            except OSError:  # the server has closed already
                break
            time.sleep(pause_s)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        received = b""
        sock.settimeout(1.0)
        try:
            while data := sock.recv(65536):
                received += data
        except (TimeoutError, ConnectionResetError):
            pass
        return received


NO_HTTP = {
    "noise": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50 + b"\r\n\r\n",),
    "another protocol": (b"EHLO x\r\n\r\n",),
    "no host": (b"GET /health/live HTTP/1.1\r\n\r\n",),
    "a huge head": (b"GET /health/live HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000,),
    "a thousand lines": (b"GET /health/live HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 20_000,),
    "two lengths": (JSON + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",),
    "a length that is none": (JSON + b"Content-Length: -5\r\n\r\n",),
    "a line that is none": (b"GET /health/live HTTP/1.1\r\nHost: x\r\nbroken line\r\n\r\n",),
}


@pytest.mark.parametrize("name", list(NO_HTTP))
def test_what_is_no_http_gets_the_envelope_and_no_more(gateway, name, caplog):
    received = exchange(gateway.port, *NO_HTTP[name])
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 "), received
    assert b"application/json" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"
    assert [r for r in caplog.records if r.exc_info] == []
    assert gateway.http.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    "tail",
    [
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\nbroken",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcdefgh\r\n0\r\n\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\nx",
    ],
)
@pytest.mark.parametrize("path", [b"/v1/completions", b"/health/live", b"/v1/files", b"/nowhere"])
def test_broken_pieces_of_a_body(gateway, tail, path, caplog):
    received = exchange(gateway.port, JSON.replace(b"/v1/completions", path) + tail)
    assert b" 500 " not in received
    assert b"Traceback" not in received
    assert received == b"" or received.startswith(b"HTTP/1.1 4"), received
    assert [r for r in caplog.records if r.exc_info] == []
    assert gateway.http.get("/health/live").status_code == 200


def test_a_good_body_in_pieces_with_extensions_and_trailers(gateway):
    tail = b"Transfer-Encoding: chunked\r\n\r\n"
    pieces = (
        b"".join(b"%x;a=b\r\n%s\r\n" % (len(p), p) for p in (BODY[:7], BODY[7:8], BODY[8:])) + b"0\r\nX-T: y\r\n\r\n"
    )
    received = exchange(gateway.port, JSON + b"Connection: close\r\n" + tail + pieces)
    assert received.startswith(b"HTTP/1.1 200 ")


def test_garbage_behind_a_good_request_does_not_spoil_its_answer(gateway):
    received = exchange(gateway.port, GOOD + b"\0garbage\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200 ")
    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", received) == [b"200", b"400"]
    assert b"invalid_http" in received


def test_many_requests_at_once_are_answered_in_their_order(gateway):
    asked = b"".join(GOOD.replace(b"Host: x", b"Host: x\r\nX-Request-ID: r%d" % i) for i in range(50))
    received = exchange(gateway.port, asked)
    ids = [line.split(b": ")[1] for line in received.split(b"\r\n") if line.startswith(b"x-request-id")]
    assert ids == [b"r%d" % i for i in range(50)]


def test_a_client_that_has_said_all_and_closes_its_half_gets_its_answer_or_a_clean_end(gateway, eventually):
    data = JSON + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(BODY) + BODY
    received = exchange(gateway.port, data, half_close=True)
    assert received == b"" or received.startswith(b"HTTP/1.1 200 ")
    eventually(lambda: gateway.backend.running == 0, "nothing is computed for nobody")


def test_a_half_of_a_body_and_then_nothing(gateway):
    data = JSON + b"Content-Length: 500\r\n\r\n" + BODY.replace(b'"x"', b'"half"')
    assert exchange(gateway.port, data, half_close=True) == b""
    asked = [gateway.tokenizer.decode(request.prompt_ids) for request in gateway.backend.requests]
    assert "half" not in asked


def test_many_slow_clients_do_not_hold_up_the_others(start):
    server = start(head_s=1.0)
    slow = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(150)]
    try:
        for sock in slow:
            sock.sendall(b"GET /health/live HT")
        assert server.chat().status_code == 200
        deadline = time.monotonic() + 5
        for sock in slow:
            sock.settimeout(max(0.1, deadline - time.monotonic()))
            assert sock.recv(100) == b""  # closed by the server
    finally:
        for sock in slow:
            sock.close()
