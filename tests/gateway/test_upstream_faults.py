"""Servers behind the gateway that fail in every way: no client waits in vain, and nothing is asked twice that began."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pingjia.gateway.upstream import Upstream
from pingjia.gateway.upstream_settings import UpstreamSettings

_spec = importlib.util.spec_from_file_location("upstream_stub_faults", Path(__file__).with_name("upstream_stub.py"))
assert _spec is not None
assert _spec.loader is not None
stubs = importlib.util.module_from_spec(_spec)
sys.modules["upstream_stub_faults"] = stubs
_spec.loader.exec_module(stubs)
Act = stubs.Act


@pytest.fixture
def pair() -> Iterator[tuple[Any, Any]]:
    """Two servers of one model."""
    both = stubs.Stub(), stubs.Stub()
    yield both
    for stub in both:
        stub.stop()


@pytest.fixture
def alone() -> Iterator[Any]:
    stub = stubs.Stub()
    yield stub
    stub.stop()


def behind(start: Callable[..., Any], *servers: Any, settings: Any = None, **upstream: Any) -> Any:
    given = tuple(s if isinstance(s, dict) else s.url for s in servers)
    backend = Upstream(UpstreamSettings(servers=given, **{"check_s": 0.05, **upstream}))
    return start(backend=backend, **(settings or {}))


def ask(gateway: Any, **fields: Any) -> httpx.Response:
    body = {"model": "big", "messages": [{"role": "user", "content": "hi"}], "temperature": 1.0, **fields}
    return gateway.http.post("/v1/chat/completions", json=body)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def only(*acts: Any) -> Callable[[dict[str, Any]], Any]:
    """The first requests get these, later ones a good answer."""
    left = list(acts)
    return lambda _: left.pop(0) if left else Act()


# ---- before the first piece: another server


@pytest.mark.parametrize(
    "act",
    [
        Act(status=500, error={"error": {"message": "cuda"}}),
        Act(status=502, error="<html>bad gateway</html>"),
        Act(status=503, error={"error": "full"}, headers={"retry-after": "30"}),
        Act(status=429, error={"error": {"message": "slow down"}}),
        Act(cut_after=0),
        Act(error_after=0),
        Act(garbage_after=0),
        Act(silent_after=0),
        Act(hang_head=True),
        Act(pieces=(), finish=None),
        Act(whole=b"[1, 2]"),
        Act(whole=b'{"choices": []}'),
        Act(raw=b""),
        Act(raw=b"data: [1]\n\n"),
        Act(raw=b"data: " + b"x" * 3_000_000),
        Act(raw=b'data: {"choices": [{"delta": {"content": 5}}]}\n\n'),
        Act(raw=b'data: {"choices": 7}\n\n'),
    ],
    ids=lambda act: next((k for k in ("raw", "whole", "status") if getattr(act, k) not in (None, 200)), "") or str(
        [k for k in ("cut_after", "error_after", "garbage_after", "silent_after", "hang_head", "finish")
         if getattr(act, k) not in (None, False, "stop")]),
)  # fmt: skip
def test_what_fails_before_the_first_piece_is_asked_of_another_server(
    start: Callable[..., Any], pair: tuple[Any, Any], act: Any
) -> None:
    pair[0].act = pair[1].act = _first_fails(act)
    gateway = behind(start, *pair, first_token_s=0.4)
    assert text(ask(gateway)) == "你好, world"
    assert len(pair[0].seen) + len(pair[1].seen) == 2
    act.hang_head, act.silent_after = False, None


def _first_fails(act: Any) -> Callable[[dict[str, Any]], Any]:
    """Whoever is asked first fails, the other does not."""
    return only(act)


def test_a_stream_that_ends_without_a_word_is_asked_why(start: Callable[..., Any], alone: Any) -> None:
    alone.act = lambda body: Act(raw=b"") if body["stream"] else Act(status=400, error={"error": {"message": "long"}})
    response = ask(behind(start, alone))
    assert (response.status_code, response.json()["error"]["message"]) == (400, "long")


def test_with_one_server_the_failure_is_told(start: Callable[..., Any], alone: Any) -> None:
    gateway = behind(start, alone)
    alone.act = Act(status=500, error={"error": {"message": "cuda says no"}})
    response = ask(gateway)
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "upstream_failed"
    assert "cuda says no" in response.json()["error"]["message"]
    alone.act = Act()
    assert text(ask(gateway)) == "你好, world"  # a 500 alone does not put a server aside


def test_all_servers_busy_tells_the_shortest_time(start: Callable[..., Any], pair: tuple[Any, Any]) -> None:
    gateway = behind(start, *pair)
    for stub, wait in zip(pair, ("40", "8"), strict=True):
        stub.act = Act(status=503, error={"error": {"message": "no room"}}, headers={"retry-after": wait})
    response = ask(gateway)
    assert (response.status_code, response.headers["retry-after"]) == (503, "8")
    assert "no room" in response.json()["error"]["message"]


def test_a_busy_server_is_left_alone_for_as_long_as_it_asked(start: Callable[..., Any], pair: tuple[Any, Any]) -> None:
    gateway = behind(start, *pair)
    pair[0].act = pair[1].act = only(Act(status=429, error={"error": "x"}, headers={"retry-after": "60"}))
    for _ in range(6):
        ask(gateway)
    assert sorted(len(stub.seen) for stub in pair) == [1, 6]


def test_a_clients_mistake_is_not_asked_twice(start: Callable[..., Any], pair: tuple[Any, Any]) -> None:
    for stub in pair:
        stub.act = Act(status=422, error={"detail": [{"msg": "field required"}]})
    response = ask(behind(start, *pair))
    assert response.status_code == 400
    assert "field required" in response.json()["error"]["message"]
    assert sum(len(stub.seen) for stub in pair) == 1


def test_retries_are_bounded(start: Callable[..., Any]) -> None:
    many = [stubs.Stub() for _ in range(4)]
    try:
        for stub in many:
            stub.act = Act(status=500, error="no")
        assert ask(behind(start, *many, retries=1)).status_code == 502
        assert sum(len(stub.seen) for stub in many) == 2
    finally:
        for stub in many:
            stub.stop()


# ---- in the middle of an answer: an error, never a second answer


@pytest.mark.parametrize(
    "act",
    [Act(cut_after=2), Act(error_after=2), Act(garbage_after=2), Act(silent_after=2), Act(finish=None)],
    ids=["cut", "error", "garbage", "silent", "no end"],
)
def test_a_stream_that_breaks_ends_in_an_error_event(
    start: Callable[..., Any], pair: tuple[Any, Any], act: Any
) -> None:
    if act.finish is None:
        act.usage, act.raw = None, b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
    for stub in pair:
        stub.act = act
    gateway = behind(start, *pair, idle_s=0.3)
    response = ask(gateway, stream=True)
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    assert json.loads(lines[-2])["error"]["code"] == "upstream_failed"
    assert sum(len(stub.seen) for stub in pair) == 1
    assert ask(gateway).status_code == 502
    act.silent_after = None


def test_a_broken_answer_is_not_kept(start: Callable[..., Any], alone: Any) -> None:
    gateway = behind(start, alone)
    alone.act = only(Act(cut_after=2))
    assert ask(gateway, temperature=0).status_code == 502
    again = ask(gateway, temperature=0)
    assert (text(again), again.headers["x-cache"]) == ("你好, world", "MISS")


def test_an_endless_answer_ends_at_the_deadline(
    start: Callable[..., Any], alone: Any, eventually: Callable[..., None]
) -> None:
    alone.act = Act(endless=True, piece_s=0.01)
    gateway = behind(start, alone, settings={"deadline_s": 0.8})
    assert ask(gateway).status_code == 504
    eventually(lambda: alone.running == 0, "the server was told to stop")


def test_a_client_that_leaves_stops_the_server_within_a_step(
    start: Callable[..., Any], alone: Any, eventually: Callable[..., None]
) -> None:
    alone.act = Act(endless=True, piece_s=0.02)
    gateway = behind(start, alone)
    for stream in (True, False):
        body = {"model": "big", "messages": [{"role": "user", "content": "x"}], "stream": stream, "temperature": 1}
        sock = gateway.raw("/v1/chat/completions", body)
        eventually(lambda: alone.running == 1, "it works")
        sent = alone.pieces_sent
        eventually(lambda sent=sent: alone.pieces_sent > sent + 2, "it says something")
        sock.close()
        left = alone.pieces_sent
        eventually(lambda: alone.running == 0, "it was told to stop", 2)
        assert alone.pieces_sent - left < 25  # half a second of a busy machine
    assert alone.num_left == 2


# ---- who is well


def test_a_server_that_is_gone_is_left_out_and_comes_back(
    start: Callable[..., Any], pair: tuple[Any, Any], eventually: Callable[..., None]
) -> None:
    gateway = behind(start, *pair)
    pair[0].go_down()
    assert [text(ask(gateway)) for _ in range(4)] == ["你好, world"] * 4
    pair[1].go_down()
    eventually(lambda: gateway.http.get("/health/ready").status_code == 503, "nobody is there")
    assert ask(gateway).status_code == 503
    assert gateway.http.get("/v1/models").json()["data"][0]["id"] == "big"  # what was served last
    pair[0].come_up()
    eventually(lambda: gateway.http.get("/health/ready").status_code == 200, "it is back")
    assert text(ask(gateway)) == "你好, world"


def test_a_server_that_says_it_is_not_well_gets_nothing(
    start: Callable[..., Any], pair: tuple[Any, Any], eventually: Callable[..., None]
) -> None:
    backend = Upstream(UpstreamSettings(servers=tuple(s.url for s in pair), check_s=0.05))
    gateway = start(backend=backend)
    pair[0].health = 503
    eventually(lambda: not backend.servers[0].is_well, "it was asked")
    for _ in range(4):
        ask(gateway)
    assert (len(pair[0].seen), len(pair[1].seen)) == (0, 4)


def test_broken_answers_in_a_row_put_a_server_aside(start: Callable[..., Any], pair: tuple[Any, Any]) -> None:
    backend = Upstream(UpstreamSettings(servers=tuple(s.url for s in pair), check_s=60.0, max_failures=2))
    gateway = start(backend=backend)
    pair[0].act = Act(cut_after=0)
    for _ in range(8):
        assert text(ask(gateway)) == "你好, world"
    assert len(pair[0].seen) == 2
    assert not backend.servers[0].is_well


def test_a_server_without_a_list_of_models_is_no_server(start: Callable[..., Any], alone: Any) -> None:
    gateway = behind(start, {"url": alone.url.removesuffix("/v1")})
    assert gateway.http.get("/health/ready").status_code == 503


def test_a_working_server_is_not_asked_what_could_disturb_it(start: Callable[..., Any], alone: Any) -> None:
    """llama-cpp-python ends the answer it is giving when another request wants its model."""
    gateway = behind(start, alone, check_s=0.02)
    asked = len(alone.headers)
    alone.act = Act(pieces=("a",) * 20, piece_s=0.02)
    assert text(ask(gateway)) == "a" * 20
    assert len(alone.headers) == asked + 1  # the answer itself; no list of models


# ---- who is asked


def test_places_are_bounded_and_those_who_wait_get_in(start: Callable[..., Any], alone: Any) -> None:
    gateway = behind(start, {"url": alone.url, "max_concurrent": 2})
    alone.act = Act(piece_s=0.02)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(text(ask(gateway)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == ["你好, world"] * 8
    assert alone.max_running == 2


def test_weights_share_out_what_is_in_work(
    start: Callable[..., Any], pair: tuple[Any, Any], eventually: Callable[..., None]
) -> None:
    gateway = behind(start, {"url": pair[0].url, "weight": 3}, {"url": pair[1].url, "weight": 1})
    held = pair[0].act = pair[1].act = Act(hang_head=True)
    threads = [threading.Thread(target=ask, args=(gateway,)) for _ in range(12)]
    for thread in threads:
        thread.start()
    eventually(lambda: pair[0].running + pair[1].running == 12, "all are in work")
    assert (pair[0].running, pair[1].running) == (9, 3)
    held.hang_head = False
    for thread in threads:
        thread.join(10)


def test_a_kept_connection_that_broke_is_no_failure(start: Callable[..., Any], alone: Any) -> None:
    backend = Upstream(UpstreamSettings(servers=(alone.url,), check_s=60.0))
    gateway = start(backend=backend)
    assert text(ask(gateway)) == "你好, world"
    alone.go_down()
    alone.come_up()
    assert text(ask(gateway)) == "你好, world"
    assert backend.servers[0].is_well


def test_draining_waits_for_the_server(start: Callable[..., Any], alone: Any) -> None:
    alone.act = Act(piece_s=0.1)
    gateway = behind(start, alone)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(text(ask(gateway))))
    thread.start()
    while not alone.running:
        time.sleep(0.01)
    gateway.server.should_exit = True
    thread.join(10)
    assert found == ["你好, world"]


_FROZEN = """
import sys, time
sys.path.insert(0, sys.argv[1])
import upstream_stub
print(upstream_stub.Stub().url, flush=True)
time.sleep(600)
"""


def test_a_frozen_server_gets_no_requests(
    start: Callable[..., Any], alone: Any, eventually: Callable[..., None]
) -> None:
    words = [sys.executable, "-c", _FROZEN, str(Path(__file__).parent)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            backend = Upstream(UpstreamSettings.model_validate({"servers": [url, alone.url], "check_s": 0.1}))
            gateway = start(backend=backend)
            process.send_signal(signal.SIGSTOP)
            eventually(lambda: not backend.servers[0].is_well, "it is seen to be frozen", 10)
            assert text(ask(gateway)) == "你好, world"
            process.send_signal(signal.SIGCONT)
            eventually(lambda: backend.servers[0].is_well, "it is well again", 10)
        finally:
            process.kill()
