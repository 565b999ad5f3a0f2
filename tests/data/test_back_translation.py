"""There and back: what is protected survives or the row is refused; and a server that does everything wrong."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data.augment import Refusal, Task
from pingjia.data.back_translation import BackTranslation, Masked, load_back_translation, mask, unmask
from pingjia.data.settings import BackTranslationSettings
from pingjia.data.spans import protected_spans
from pingjia.data.translation import EndpointTranslator
from pingjia.errors import PingjiaError, UserError


class Fake:
    """A translator that does what it is told, and keeps what it was sent."""

    def __init__(self, change: Callable[[str], str | PingjiaError] = lambda text: text) -> None:
        self.change = change
        self.sent: list[str] = []

    def translate(self, texts: Sequence[str]) -> list[str | PingjiaError]:
        self.sent += texts
        return [self.change(text) for text in texts]


def _back(
    text: str,
    backward: Callable[[str], str | PingjiaError] = lambda t: t,
    *facts: str,
    forward: Callable[[str], str | PingjiaError] = lambda t: t,
) -> str | Refusal:
    return BackTranslation(Fake(forward), Fake(backward)).make([Task(text, facts, "k")])[0]


def _rule(outcome: str | Refusal) -> str:
    return outcome.rule if isinstance(outcome, Refusal) else f"made {outcome!r}"


# ---- codes


def _masked(text: str, *facts: str) -> Masked:
    masked = mask(text, protected_spans(text, facts))
    assert masked is not None
    return masked


def test_codes_stand_for_what_is_protected() -> None:
    masked = _masked("张伟买的KX-200用了3天坏了，能不能退？")
    assert masked.text == "XQ0 买的 XQ1 用了 XQ2 坏了，能不能退？"
    assert masked.pieces == ("张伟", "KX-200", "3天")


def test_pieces_that_touch_share_a_code() -> None:
    assert _masked("请看《三体》第2册 3页吧").pieces == ("《三体》第2册 3页",)


def test_negations_are_translated() -> None:
    assert _masked("不能退货吗").pieces == ()


def test_a_text_that_holds_such_a_code_gets_others() -> None:
    masked = _masked("型号xq 7怎么用，3天能到吗")
    assert masked.prefix == "ZK"
    assert unmask(masked, masked.text) == "型号xq 7怎么用，3天能到吗"


@pytest.mark.parametrize("text", ["《三体》", "3天", "KX-200 😀", "？"])
def test_nothing_is_sent_when_nothing_is_free(text: str) -> None:
    forward = Fake()
    outcome = BackTranslation(forward, Fake()).make([Task(text, (), "k")])[0]
    assert _rule(outcome) in ("nothing_to_translate", "other_language")
    assert forward.sent == []


@pytest.mark.parametrize(
    ("received", "restored"),
    [
        ("XQ0 坏了", "3天坏了"),
        ("坏了 XQ 0。", "坏了3天。"),
        ("xq0坏了", "3天坏了"),
        ("broken for XQ0 now", "broken for 3天 now"),
        ("broken for XQ0, now", "broken for 3天, now"),
    ],
)
def test_a_code_becomes_its_piece(received: str, restored: str) -> None:
    assert unmask(Masked("坏了 XQ0", ("3天",), "XQ"), received) == restored


@pytest.mark.parametrize(
    ("received", "reason"),
    [
        ("坏了", "no more"),
        ("XQ0 坏了", "no more"),
        ("XQ0 XQ1 XQ1", "twice"),
        ("XQ1 坏了 XQ0", "order"),
        ("XQ0 XQ1 XQ2", "had not"),
        ("XQ0 XQ1 XQ", "had not"),
        ("XQ01 XQ0", "order"),
        ("XQ0 XQ1 XQ10", "had not"),
    ],
)
def test_damage_is_refused(received: str, reason: str) -> None:
    outcome = unmask(Masked("XQ0 坏了 XQ1", ("3天", "张伟"), "XQ"), received)
    assert isinstance(outcome, Refusal)
    assert outcome.rule == "placeholders"
    assert reason in outcome.reason


_PIECES = st.sampled_from(
    ["3天", "不", "张伟", "《三体》", "KX-200", "{name}", "😀", "，", "怎么", "退货", "xq1", "ZK 3", " "]
)


@given(st.lists(_PIECES, max_size=10).map("".join))
def test_a_perfect_translator_gives_the_text_back(text: str) -> None:
    masked = mask(text, protected_spans(text))
    if masked is not None:
        restored = unmask(masked, masked.text)
        assert isinstance(restored, str)
        assert re.sub(r"\s", "", restored) == re.sub(r"\s", "", text)


# ---- the maker


def test_a_paraphrase_comes_back_whole() -> None:
    text = "张伟买的KX-200不制冷，3天内能退吗？"
    made = _back(text, lambda t: t.replace("能退吗", "可以退货吗"))
    assert made == "张伟买的KX-200不制冷，3天内可以退货吗？"


def test_facts_go_through_as_codes() -> None:
    forward = Fake()
    BackTranslation(forward, Fake()).make([Task("内胆质保多久", ("质保",), "k")])
    assert forward.sent == ["内胆 XQ0 多久"]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda t: t.replace("XQ1", ""), "placeholders"),
        (lambda t: t + " XQ0", "placeholders"),
        (lambda t: t.replace("XQ0", "XQ9").replace("XQ1", "XQ0").replace("XQ9", "XQ1"), "placeholders"),
        (lambda t: t.replace("不", ""), "spans"),
        (lambda t: t + "第2个", "spans"),
        (lambda t: t + "别这样", "spans"),
        (lambda t: "这是对问题的回答。" * 9 + t, "not_a_translation"),
        (lambda t: "好的，翻译如下：\n" + t, "not_a_translation"),
        (lambda t: "Is XQ0 with 不 cool, within XQ1 ok", "other_language"),
        (lambda t: "", "translation_failed"),
        (lambda t: "  ", "translation_failed"),
        (lambda t: PingjiaError("the server is on fire"), "translation_failed"),
    ],
)
def test_damaged_translations_are_refused(change: Callable[[str], str | PingjiaError], rule: str) -> None:
    text = "张伟的冰箱不制冷，3天内能退吗？"
    assert _rule(_back(text, change)) == rule


def test_a_code_lost_on_the_way_out_is_not_sent_back() -> None:
    backward = Fake()
    maker = BackTranslation(Fake(lambda t: t.replace("XQ0", "")), backward)
    outcomes = maker.make([Task("3天能到吗", (), "k"), Task("多久能到", (), "k")])
    assert _rule(outcomes[0]) == "placeholders"
    assert backward.sent == ["多久能到"]


def test_codes_may_change_their_order_abroad() -> None:
    swap = lambda t: t.replace("XQ0", "@").replace("XQ1", "XQ0").replace("@", "XQ1")  # noqa: E731
    assert _back("张伟买了3天就坏", swap, forward=swap) == "张伟买了3天就坏"


def test_failures_stay_in_their_place() -> None:
    fails = Fake(lambda t: PingjiaError("too long") if "长" in t else t)
    outcomes = BackTranslation(fails, Fake()).make([Task(t, (), "k") for t in ("第一句", "很长的", "再一句")])
    assert outcomes[1] == Refusal("translation_failed", "too long")
    assert isinstance(outcomes[2], str)


def test_only_its_own_language_is_sent() -> None:
    forward = Fake()
    outcome = BackTranslation(forward, Fake()).make([Task("Where is my order now, please tell me?", (), "k")])[0]
    assert outcome == Refusal("other_language", "the question is in en, the translators take zh")
    assert forward.sent == []


def test_a_second_copy_is_refused() -> None:
    outcome = BackTranslation(Fake(), Fake()).make([Task("怎么退货", (), "k", copy=2)])[0]
    assert _rule(outcome) == "no_variant"


def test_a_translator_that_loses_count_is_our_bug() -> None:
    class Short(Fake):
        def translate(self, texts: Sequence[str]) -> list[str | PingjiaError]:
            return list(texts)[1:]

    with pytest.raises(PingjiaError, match="sent 1 texts and returned 0"):
        BackTranslation(Short(), Fake()).make([Task("怎么退货", (), "k")])


# ---- a server

Reply = tuple[int, Any, dict[str, str]] | None


def _said(text: str | None, finish: str = "stop") -> Reply:
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": finish}]}, {}


class Server(ThreadingHTTPServer):
    """Answers its n-th request with `reply(n, text)`; None hangs up. `pause_s` before each answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply: Callable[[int, str], Reply] = lambda n, text: _said(text)
        self.pause_s = 0.0
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.open = self.most_open = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is part of these tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers.get("authorization"))
            server.times.append(time.monotonic())
            n = len(server.bodies)
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        time.sleep(server.pause_s)
        with server.lock:
            server.open -= 1
        self._send(server.reply(n, body["messages"][-1]["content"]))

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
        """Not into the test's output."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def _endpoint(server: Server, **options: Any) -> EndpointTranslator:
    return EndpointTranslator(server.url, "m", "en", **{"backoff_s": 0.01, "timeout_s": 5.0, **options})


def test_each_text_is_asked_for(server: Server) -> None:
    server.reply = lambda n, text: _said(f"<think>hm</think>\n T({text}) ")
    assert _endpoint(server).translate(["一", "二", "三"]) == ["T(一)", "T(二)", "T(三)"]
    body = server.bodies[0]
    assert body["model"] == "m"
    assert body["temperature"] == 0
    assert "English" in body["messages"][0]["content"]


def test_no_more_requests_at_once_than_allowed(server: Server) -> None:
    server.pause_s = 0.02
    assert len(_endpoint(server, max_concurrency=2).translate([str(i) for i in range(10)])) == 10
    assert server.most_open <= 2


def test_it_waits_as_long_as_the_server_asks(server: Server) -> None:
    busy: Reply = (429, {"error": {"message": "slow down"}}, {"Retry-After": "0.3"})
    server.reply = lambda n, text: busy if n == 1 else _said(text)
    assert _endpoint(server).translate(["一"]) == ["一"]
    assert server.times[1] - server.times[0] >= 0.3


@pytest.mark.parametrize(
    "fault",
    [
        (500, b"oops", {}),
        (503, {"error": "busy"}, {}),
        (200, b"{not json", {}),
        (200, {"choices": []}, {}),
        (200, [1], {}),
        (200, {"choices": [{"message": None}]}, {}),
        None,
    ],
)
def test_what_may_pass_is_tried_again(server: Server, fault: Reply) -> None:
    server.reply = lambda n, text: fault if n <= 2 else _said(text)
    assert _endpoint(server).translate(["一"]) == ["一"]
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("fault", "reason", "num_tries"),
    [
        ((500, {"error": {"message": "broken"}}, {}), "answers 500: broken", 3),
        ((200, b"<html>", {}), "not in OpenAI's format", 3),
        (None, "the connection broke", 3),
        ((429, {}, {"Retry-After": "3600"}), "answers 429", 1),
        ((400, {"error": {"message": "content filter"}}, {}), "answers 400: content filter", 1),
        (_said("half", "length"), "length limit", 1),
        (_said(None), "empty translation", 1),
        (_said("<think>x</think>"), "empty translation", 1),
    ],
)
def test_one_text_fails_and_the_others_pass(server: Server, fault: Reply, reason: str, num_tries: int) -> None:
    server.reply = lambda n, text: fault if text == "坏" else _said(text)
    good, bad, also_good = _endpoint(server, max_retries=2).translate(["好", "坏", "也好"])
    assert (good, also_good) == ("好", "也好")
    assert isinstance(bad, PingjiaError)
    assert reason in str(bad)
    assert len(server.bodies) == 2 + num_tries


def test_a_server_that_is_too_slow(server: Server) -> None:
    server.pause_s = 0.5
    (answer,) = _endpoint(server, timeout_s=0.1, max_retries=1).translate(["一"])
    assert isinstance(answer, PingjiaError)
    assert "no answer within 0.1 s" in str(answer)


@pytest.mark.parametrize("status", [401, 403, 404, 307])
def test_what_fails_for_all_stops_at_once(server: Server, status: int) -> None:
    server.reply = lambda n, text: (status, {"error": {"message": "bad key sk-secret"}}, {})
    with pytest.raises(UserError, match=f"answers {status}") as caught:
        _endpoint(server, api_key="sk-secret", max_concurrency=1).translate([str(i) for i in range(50)])
    assert "sk-secret" not in str(caught.value)
    assert len(server.bodies) < 10
    assert server.keys[0] == "Bearer sk-secret"


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=r"not reachable.*is the server up"):
        EndpointTranslator(url, "m", "en", backoff_s=0.001).translate(["一"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "ftp://x"}, "not an http"),
        ({"base_url": "http://"}, "not an http"),
        ({"base_url": "http://me:secret@host/v1"}, "holds a password"),
        ({"api_key": "钥匙"}, "API key"),
        ({"max_concurrency": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        EndpointTranslator(**{"base_url": "http://h/v1", "model": "m", "target": "en", **options})
    assert "secret" not in str(caught.value)


def test_the_key_is_never_shown() -> None:
    assert "sk-1" not in repr(EndpointTranslator("http://h/v1", "m", "en", api_key="sk-1"))


def test_there_and_back_through_a_server_that_loses_pieces(server: Server) -> None:
    """Every third answer has no codes left; no damaged question comes out."""

    def reply(n: int, text: str) -> Reply:
        return _said(re.sub(r"XQ\d", "", text) if n % 3 == 0 else text.replace("能退吗", "可以退吗"))

    server.reply = reply
    maker = BackTranslation(_endpoint(server), _endpoint(server))
    texts = [f"我买了{i}天，能退吗？" for i in range(10, 40)]
    outcomes = maker.make([Task(text, (), "k") for text in texts])
    made = [(t, o) for t, o in zip(texts, outcomes, strict=True) if isinstance(o, str)]
    assert 5 < len(made) < 25
    assert all(o == t.replace("能退吗", "可以退吗") for t, o in made)
    assert {_rule(o) for o in outcomes if isinstance(o, Refusal)} == {"placeholders"}


# ---- from a recipe


def test_a_recipe_with_an_endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-2")
    settings = BackTranslationSettings(ratio=1, endpoint=server.url, model="m", api_key_env="MY_KEY")
    maker = load_back_translation(settings, load=lambda *_: pytest.fail("no directory was asked for"))
    assert maker.make([Task("怎么退货", (), "k")]) == ["怎么退货"]
    assert ["English" in b["messages"][0]["content"] for b in server.bodies] == [True, False]
    assert set(server.keys) == {"Bearer sk-2"}


@pytest.mark.parametrize(
    ("codes", "asked"),
    [
        (None, [("f", "zh", "en"), ("b", "en", "zh")]),
        (("zho_Hans", "eng_Latn"), [("f", "zho_Hans", "eng_Latn"), ("b", "eng_Latn", "zho_Hans")]),
    ],
)
def test_a_recipe_with_two_directories(codes: tuple[str, str] | None, asked: list[tuple[str, str, str]]) -> None:
    opened: list[tuple[str, str, str]] = []

    def load(directory: str, source: str, target: str) -> Fake:
        opened.append((directory, source, target))
        return Fake()

    load_back_translation(BackTranslationSettings(ratio=1, forward="f", backward="b", codes=codes), load)
    assert opened == asked


def test_a_recipe_without_a_translator() -> None:
    with pytest.raises(UserError, match="needs forward and backward"):
        load_back_translation(BackTranslationSettings(ratio=1, forward="f"), load=lambda *_: Fake())
