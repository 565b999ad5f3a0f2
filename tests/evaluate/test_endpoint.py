"""The HTTP generator against a real server in a thread that answers, refuses, stalls and hangs up as told."""

from __future__ import annotations

import asyncio
import email.utils
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pingjia.errors import RequestError, UserError
from pingjia.evaluate import Endpoint, EvalSettings, evaluate
from pingjia.types import Completion, Grammar, Message, Sampling, Usage

Reply = tuple[int, Any, dict[str, str]] | None  # status, body, headers; None hangs up without a word


def said(text: str, finish_reason: str | None = "stop") -> Reply:
    choice = {"message": {"role": "assistant", "content": text}, "text": text, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    return 200, {"choices": [choice], "usage": usage}, {}


def error(status: int, message: str = "no", **headers: str) -> Reply:
    return status, {"error": {"message": message}}, {name.replace("_", "-"): value for name, value in headers.items()}


class Server(ThreadingHTTPServer):
    """Calls `reply(n, path, body)` for its n-th request; keeps what was asked and how many were open at once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Callable[[int, str, dict[str, Any]], Reply] = lambda n, path, body: said("ok")
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.open = self.most_open = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is part of these tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.asked.append((self.path, body, {k.lower(): v for k, v in self.headers.items()}))
            n = len(server.asked)
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        try:
            self._send(server.reply(n, self.path, body))
        finally:
            with server.lock:
                server.open -= 1

    def _send(self, reply: Reply) -> None:
        if reply is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, content, headers = reply
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def endpoint(server: Server, **fields: Any) -> Endpoint:
    return Endpoint(server.url, "tiny", **{"backoff_s": 0.01, **fields})


CHAT = (Message("system", "be brief"), Message("user", "保修多久？"))


def test_conversations_and_raw_prompts_go_to_their_own_path(server: Server) -> None:
    server.reply = lambda n, path, body: said("36个月" if "chat" in path else " more", "length")
    done = endpoint(server, api_key="secret").generate(
        [CHAT, "once upon"], Sampling(max_tokens=9, stop=("。",), seed=3)
    )
    assert [c.text for c in done] == ["36个月", " more"]
    assert done[0] == Completion("36个月", (), "length", Usage(5, 2, 1))
    bodies = {path: body for path, body, _ in server.asked}
    assert bodies["/v1/chat/completions"]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "保修多久？"},
    ]
    assert bodies["/v1/completions"]["prompt"] == "once upon"
    for body in bodies.values():
        assert {"model": "tiny", "max_tokens": 9, "temperature": 0.0, "stop": ["。"], "seed": 3}.items() <= body.items()
        assert not {"top_k", "min_p", "repetition_penalty", "ignore_eos", "stop_token_ids"} & set(body)
    assert all(headers["authorization"] == "Bearer secret" for _, _, headers in server.asked)


def test_fields_beyond_openai_are_sent_only_when_set(server: Server) -> None:
    endpoint(server).generate(["a"], Sampling(top_k=5, ignore_eos=True))
    body = server.asked[0][1]
    assert (body["top_k"], body["ignore_eos"]) == (5, True)
    assert "min_p" not in body
    assert "authorization" not in server.asked[0][2]


def test_answers_come_back_in_order_whatever_order_they_end_in(server: Server) -> None:
    def slower_first(n: int, path: str, body: dict[str, Any]) -> Reply:
        time.sleep(0.15 if body["prompt"] == "0" else 0.0)
        return said(f"answer {body['prompt']}")

    server.reply = slower_first
    caller, ended, threads = threading.get_ident(), [], set()

    def on_done(index: int, completion: Completion) -> None:
        ended.append((index, completion.text))
        threads.add(threading.get_ident())

    done = endpoint(server).generate([str(i) for i in range(6)], on_done=on_done)
    assert [c.text for c in done] == [f"answer {i}" for i in range(6)]
    assert sorted(ended) == [(i, f"answer {i}") for i in range(6)]
    assert ended[0][0] != 0
    assert threads == {caller}


def test_no_more_requests_at_once_than_allowed(server: Server) -> None:
    def slow(n: int, path: str, body: dict[str, Any]) -> Reply:
        time.sleep(0.03)
        return said("ok")

    server.reply = slow
    endpoint(server, max_concurrency=3).generate(["a"] * 12)
    assert len(server.asked) == 12
    assert server.most_open == 3


def test_one_sampling_each(server: Server) -> None:
    endpoint(server, max_concurrency=1).generate(["a", "b"], [Sampling(max_tokens=1), Sampling(max_tokens=2)])
    assert [body["max_tokens"] for _, body, _ in server.asked] == [1, 2]
    with pytest.raises(RequestError, match="2 prompts but 1 samplings"):
        endpoint(server).generate(["a", "b"], [Sampling()])


def test_nothing_to_ask_asks_nothing(server: Server) -> None:
    assert endpoint(server).generate([]) == []
    assert server.asked == []


@pytest.mark.parametrize("failure", [error(429), error(502), error(503), error(504), None], ids=str)
def test_passing_failures_are_tried_again(server: Server, failure: Reply) -> None:
    server.reply = lambda n, path, body: failure if n <= 2 else said("ok")
    assert endpoint(server).generate(["a"])[0].text == "ok"
    assert len(server.asked) == 3


def test_retry_after_is_waited_for(server: Server) -> None:
    times: list[float] = []

    def busy_once(n: int, path: str, body: dict[str, Any]) -> Reply:
        times.append(time.monotonic())
        return error(429, retry_after="1") if n == 1 else said("ok")

    server.reply = busy_once
    endpoint(server, backoff_s=0.0).generate(["a"])
    assert times[1] - times[0] >= 1.0  # the promise is a lower bound, so a slow machine cannot break this


def test_retry_after_may_be_a_date(server: Server) -> None:
    past = email.utils.formatdate(time.time() - 100, usegmt=True)
    server.reply = lambda n, path, body: error(503, retry_after=past) if n == 1 else said("ok")
    assert endpoint(server, backoff_s=1e9).generate(["a"])[0].text == "ok"  # the backoff alone would wait for a minute


def test_a_server_that_asks_for_too_long_a_wait_is_reported(server: Server) -> None:
    server.reply = lambda n, path, body: error(429, "quota used up", retry_after="3600")
    with pytest.raises(UserError, match=r"quota used up; it asks to wait 3600 s"):
        endpoint(server).generate(["a"])


def test_failures_that_stay_are_reported_with_the_number_of_tries(server: Server) -> None:
    server.reply = lambda n, path, body: error(503, "loading the model")
    with pytest.raises(UserError, match=r"answers 503: loading the model \(3 tries\)"):
        endpoint(server, max_retries=2).generate(["a"])
    assert len(server.asked) == 3


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}/v1: not reachable .*2 tries.*is the server up"):
        Endpoint(f"http://127.0.0.1:{port}/v1", "tiny", max_retries=1, backoff_s=0.01).generate(["a"])


def test_a_server_that_never_answers(server: Server) -> None:
    release = threading.Event()

    def stuck(n: int, path: str, body: dict[str, Any]) -> Reply:
        release.wait(20)
        return None

    server.reply = stuck
    try:
        with pytest.raises(UserError, match=r"no answer within 0\.2 s"):
            endpoint(server, max_retries=0, timeout_s=0.2).generate(["a"])
    finally:
        release.set()


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "check the API key"), (404, "'tiny' is served"), (400, "did not accept"), (302, "302")]
)
def test_refusals_are_not_tried_again(server: Server, status: int, hint: str) -> None:
    server.reply = lambda n, path, body: error(status, "bad thing", location="http://127.0.0.1:9/")
    with pytest.raises(UserError, match=hint) as caught:
        endpoint(server, api_key="secret").generate(["a"])
    assert "bad thing" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "body",
    [b"<html>hello</html>", b"[]", b"{}", {"choices": []}, {"choices": [{"message": None}]}, {"choices": [3]},
     {"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": "x"}}, b"\xff"],
)  # fmt: skip
def test_an_answer_in_another_format_is_reported(server: Server, body: Any) -> None:
    server.reply = lambda n, path, asked: (200, body, {})
    with pytest.raises(UserError, match="not in OpenAI's format"):
        endpoint(server).generate([CHAT])


@pytest.mark.parametrize(
    ("raw", "expected"),
    [("stop", "stop"), ("length", "length"), ("tool_calls", "stop"), ("content_filter", "error"), (None, "stop")],
)
def test_finish_reasons(server: Server, raw: str | None, expected: str) -> None:
    server.reply = lambda n, path, body: said("a", raw)
    assert endpoint(server).generate(["a"])[0].finish_reason == expected


def test_no_content_and_no_usage_are_an_empty_answer(server: Server) -> None:
    server.reply = lambda n, path, body: (200, {"choices": [{"message": {"content": None}}]}, {})
    assert endpoint(server).generate([CHAT]) == [Completion("", (), "stop", Usage())]


def test_a_failure_ends_the_requests_still_running(server: Server) -> None:
    release = threading.Event()

    def first_fails(n: int, path: str, body: dict[str, Any]) -> Reply:
        if body["prompt"] == "bad":
            return error(400, "bad prompt")
        release.wait(20)
        return said("late")

    server.reply = first_fails
    started = time.monotonic()
    try:
        with pytest.raises(UserError, match="bad prompt"):
            endpoint(server, max_concurrency=2).generate(["slow", "bad", *["never asked"] * 20])
        assert time.monotonic() - started < 15  # it did not wait for the slow one, which is released only below
    finally:
        release.set()
    # One or two more may slip through the gate before the cancellation reaches the loop; most are never sent.
    assert len(server.asked) < 10


def test_an_interrupt_in_the_callback_ends_everything(server: Server) -> None:
    def interrupt(index: int, completion: Completion) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        endpoint(server, max_concurrency=1).generate(["a"] * 50, on_done=interrupt)
    assert len(server.asked) < 50


def test_it_works_inside_a_running_event_loop(server: Server) -> None:
    async def notebook() -> str:
        return endpoint(server).generate(["a"])[0].text

    assert asyncio.run(notebook()) == "ok"


def test_a_proxy_is_not_asked_for_this_machine(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert endpoint(server, max_retries=0).generate(["a"])[0].text == "ok"


def test_half_a_character_in_a_prompt_can_be_sent(server: Server) -> None:
    endpoint(server).generate(["a\ud83d"])
    assert server.asked[0][1]["prompt"] == "a\ud83d"


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x/v1", "", "http://", "http://x:port/v1", "http://xn--/v1", "/v1"]
)
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(UserError, match="URL"):
        Endpoint(url, "tiny")


def test_arguments_are_checked_and_the_key_is_not_shown() -> None:
    with pytest.raises(UserError, match="max_concurrency"):
        Endpoint("http://x/v1", "tiny", max_concurrency=0)
    with pytest.raises(UserError, match="API key") as caught:
        Endpoint("http://x/v1", "tiny", api_key="ｓｅｃｒｅｔ")
    assert "ｓｅｃｒｅｔ" not in str(caught.value)
    assert "hush" not in repr(Endpoint("http://x/v1", "tiny", api_key="hush"))


@pytest.mark.parametrize(
    ("sampling", "name"),
    [(Sampling(logprobs=2), "logprobs"), (Sampling(n=2), "n:"), (Sampling(grammar=Grammar.regex("a")), "grammar")],
)
def test_what_cannot_be_asked_is_refused_rather_than_dropped(server: Server, sampling: Sampling, name: str) -> None:
    with pytest.raises(RequestError, match=name):
        endpoint(server).generate(["a"], sampling)
    assert server.asked == []


def test_a_bias_is_sent_as_openai_writes_it(server: Server) -> None:
    endpoint(server).generate(["a"], Sampling(logit_bias={5: -2.0}, min_tokens=3))
    assert server.asked[0][1]["logit_bias"] == {"5": -2.0}
    assert server.asked[0][1]["min_tokens"] == 3


def test_an_evaluation_over_http(server: Server, ask) -> None:
    server.reply = lambda n, path, body: said("整机保修36个月。")
    questions = [ask("保修多久？", "保修36个月。", facts=("36个月",)), ask("多少钱？", "1,000元", facts=("1000元",))]
    report = evaluate(questions, endpoint(server), EvalSettings(max_tokens=8))
    assert report.overall.scores["exact_facts"].mean == 0.5
    assert report.fact("eval.before").completion_tokens == 4
    assert all(body["temperature"] == 0.0 and body["max_tokens"] == 8 for _, body, _ in server.asked)
