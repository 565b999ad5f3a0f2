"""The semantic layer of the cache: who may share an answer, checks of hits, and the encoder's process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from pingjia.errors import ModelError
from pingjia.gateway.semantic import Semantics, Topic
from pingjia.gateway.semantic_encoder import ChildEncoder, Meanings
from pingjia.gateway.settings import SemanticSettings
from pingjia.locate import locate_model
from pingjia.types import ModelCard

CARDS = [
    ModelCard("base", "/models/base", None, 4096, 1, digest="b" * 64),
    ModelCard("shop", "/adapters/shop", "base", 4096, 1, digest="c" * 64),
]
ASKED, AGAIN = "How do I reset my password?", "Could you tell me how to reset my password?"


class OneMeaning:
    """Everything means the same to it, so that only the rules stand between questions."""

    def __init__(self, cosine: float = 1.0, unknown: float = 0.0) -> None:
        self.cosine, self.unknown = cosine, unknown
        self.asked: list[list[str]] = []

    async def encode(self, texts: Sequence[str]) -> Meanings | None:
        self.asked.append(list(texts))
        second = [self.cosine, (1 - self.cosine**2) ** 0.5]
        return Meanings(np.array([[1.0, 0.0], second], np.float32), (self.unknown,) * len(texts))

    async def close(self) -> None:
        pass


@pytest.fixture
def served(start: Callable[..., Any]) -> Callable[..., Any]:
    """Start a gateway whose semantic layer has an encoder that finds everything alike."""

    def make(encoder: Any = None, draw: float = 1.0, **semantic: Any) -> Any:
        gateway = start(cache={"semantic": {"directory": "nowhere", **semantic}})
        gateway.backend.cards = CARDS
        semantics = gateway.app.state.service.cache.semantics
        semantics._encoder, semantics._draw = encoder or OneMeaning(), lambda: draw
        return gateway

    return make


def outcome(gateway: Any, content: Any, **fields: Any) -> str:
    response = gateway.chat(content, temperature=0, **fields)
    assert response.status_code == 200, response.text
    return str(response.headers["x-cache"])


def text(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


def test_a_question_that_says_the_same_gets_the_answer(served: Callable[..., Any]) -> None:
    gateway = served()
    first = gateway.chat(ASKED, temperature=0)
    again = gateway.chat(AGAIN, temperature=0)
    assert (first.headers["x-cache"], again.headers["x-cache"]) == ("MISS", "SEMANTIC")
    assert text(again) == text(first)
    assert len(gateway.backend.requests) == 1
    assert "age" in again.headers
    streamed = gateway.chat(AGAIN, temperature=0, stream=True)
    assert streamed.headers["x-cache"] == "SEMANTIC"
    assert 'cache_requests_total{outcome="semantic"} 2.0' in gateway.http.get("/metrics").text


def test_it_is_off_unless_asked_for(start: Callable[..., Any]) -> None:
    gateway = start()
    gateway.backend.cards = CARDS
    assert [outcome(gateway, ASKED), outcome(gateway, AGAIN)] == ["MISS", "MISS"]


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "shop"},
        {"max_tokens": 7},
        {"seed": 3},
        {"stop": ["x"]},
        {"n": 2},
        {"response_format": {"type": "json_object"}},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": AGAIN}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                      {"role": "user", "content": AGAIN}]},
    ],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_whatever_else_differs_it_is_computed(served: Callable[..., Any], fields: Any) -> None:
    gateway = served()
    assert outcome(gateway, ASKED) == "MISS"
    assert outcome(gateway, AGAIN, **fields) == "MISS"


def test_an_equal_history_is_no_hindrance_another_is(served: Callable[..., Any]) -> None:
    gateway = served()

    def asked(first: str, last: str) -> str:
        turns = [("user", first), ("assistant", "yes"), ("user", last)]
        return outcome(gateway, "", messages=[{"role": r, "content": c} for r, c in turns])

    assert [asked("a", ASKED), asked("a", AGAIN), asked("b", AGAIN)] == ["MISS", "SEMANTIC", "MISS"]


def test_what_is_drawn_is_never_shared(served: Callable[..., Any]) -> None:
    gateway = served()
    outcome(gateway, ASKED)
    assert gateway.chat(AGAIN, temperature=1).headers["x-cache"] == "BYPASS"


@pytest.mark.parametrize("encoder", [OneMeaning(cosine=0.8), OneMeaning(unknown=0.5)], ids=["far", "unknown"])
def test_the_encoder_must_agree_and_know_the_words(served: Callable[..., Any], encoder: Any) -> None:
    gateway = served(encoder)
    assert [outcome(gateway, ASKED), outcome(gateway, AGAIN)] == ["MISS", "MISS"]
    assert encoder.asked == [[AGAIN, ASKED]]


def test_the_encoder_is_not_asked_where_rules_say_no(served: Callable[..., Any]) -> None:
    encoder = OneMeaning()
    gateway = served(encoder)
    assert [outcome(gateway, q) for q in (ASKED, "How do I not reset my password?", "Reset it")] == ["MISS"] * 3
    assert encoder.asked == []


def test_tenants_share_nothing(served: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINGJIA_API_KEYS", "sk-one,sk-two")
    gateway = served()
    gateway.http.headers["authorization"] = "Bearer sk-one"
    outcome(gateway, ASKED)
    gateway.http.headers["authorization"] = "Bearer sk-two"
    assert outcome(gateway, AGAIN) == "MISS"


def test_no_store_no_cache_and_a_purge_are_obeyed(served: Callable[..., Any]) -> None:
    gateway = served()
    outcome(gateway, ASKED)
    body = {"model": "base", "messages": [{"role": "user", "content": AGAIN}], "temperature": 0}
    for wish in ("no-store", "no-cache"):
        response = gateway.http.post("/v1/chat/completions", json=body, headers={"cache-control": wish})
        assert response.headers["x-cache"] in ("BYPASS", "MISS")
    gateway.http.delete("/v1/cache")
    assert outcome(gateway, "Please tell me how to reset my password") == "MISS"


def test_an_answer_that_is_not_kept_any_more_is_computed(served: Callable[..., Any]) -> None:
    gateway = served()
    outcome(gateway, ASKED)
    gateway.app.state.service.cache._store._kept.clear()
    assert outcome(gateway, AGAIN) == "MISS"
    assert outcome(gateway, ASKED) == "SEMANTIC"


# ---- checks


def test_wrong_answers_turn_it_off_and_a_purge_of_all_on(
    served: Callable[..., Any], eventually: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    gateway = served(OneMeaning(), draw=0.0)
    semantics = gateway.app.state.service.cache.semantics
    gateway.backend.script.text = lambda request: f"answer {len(gateway.backend.requests)}"
    outcome(gateway, ASKED)
    assert outcome(gateway, AGAIN) == "SEMANTIC"
    eventually(lambda: not semantics.is_on, "the check found another number in the answer")
    assert "wrong_budget" in caplog.text
    assert outcome(gateway, "Please tell me how to reset my password") == "MISS"
    metrics = gateway.http.get("/metrics").text
    assert "pingjia_semantic_on 0.0" in metrics
    assert 'semantic_checks_total{result="wrong"} 1.0' in metrics
    semantics.purge(None)
    assert semantics.is_on


def test_right_answers_leave_it_on(served: Callable[..., Any], eventually: Callable[..., None]) -> None:
    gateway = served(draw=0.0)
    semantics = gateway.app.state.service.cache.semantics
    outcome(gateway, ASKED)
    outcome(gateway, AGAIN)
    eventually(lambda: semantics.num_checked == 1, "it was checked")
    assert semantics.is_on
    assert outcome(gateway, AGAIN) == "HIT"  # what was computed for the check is kept too


def test_a_check_that_fails_says_nothing(served: Callable[..., Any], eventually: Callable[..., None]) -> None:
    gateway = served(draw=0.0)
    semantics = gateway.app.state.service.cache.semantics
    outcome(gateway, ASKED)
    gateway.backend.script.raise_after = 1
    assert outcome(gateway, AGAIN) == "SEMANTIC"
    eventually(lambda: len(gateway.backend.requests) == 2 and gateway.backend.running == 0, "the check has failed")
    assert (semantics.num_checked, semantics.is_on) == (0, True)


def layer(**settings: Any) -> Semantics:
    given = SemanticSettings(directory="x", **settings)
    return Semantics(given, CollectorRegistry(), OneMeaning(), lambda: 0.5)


async def test_the_budget_is_of_what_was_checked() -> None:
    semantics = layer(wrong_budget=0.1)
    for _ in range(2):
        await semantics.judge("1", "2")
    assert semantics.is_on  # 2 of at least 20
    await semantics.judge("1", "2")
    assert not semantics.is_on


async def test_memory_is_bounded_and_the_oldest_go() -> None:
    semantics = layer(max_entries=3)
    topics = [Topic("c", f"{i}?", (str(i),)) for i in range(5)]
    for topic in topics:
        semantics.add(topic, "me", topic.text)
    assert [await semantics.find(topic) for topic in topics] == [None, None, "2?", "3?", "4?"]
    semantics.purge("another")
    assert await semantics.find(topics[4])
    semantics.purge("me")
    assert await semantics.find(topics[4]) is None


# ---- the encoder's process


@pytest.fixture
def minilm() -> str:
    try:
        return str(locate_model("minilm"))
    except ModelError as e:
        pytest.skip(f"NOT TESTED with a real encoder: {e}")


async def test_a_real_encoder_in_its_process(minilm: str) -> None:
    encoder = ChildEncoder(minilm)
    try:
        assert await encoder.encode(["a", "b"]) is None  # it is only just starting: nobody waits for it
        assert await encoder.wait_ready()
        found = await encoder.encode([ASKED, AGAIN, "Where is the station?", "张三借给李四多少钱"])
        assert found is not None
        cosine = found.vectors_NH @ found.vectors_NH.T
        assert cosine[0, 1] > 0.85 > 0.5 > cosine[0, 2]
        assert found.unknown_N[0] == 0.0
        assert found.unknown_N[3] > 0.1  # MiniLM knows few Chinese characters: such questions are left alone
        assert encoder._process is not None
        os.kill(encoder._process.pid, signal.SIGKILL)
        assert await encoder.encode(["a", "b"]) is None
    finally:
        await encoder.close()


async def test_a_directory_without_an_encoder_costs_hits_only(caplog: pytest.LogCaptureFixture) -> None:
    encoder = ChildEncoder("/nowhere")
    assert not await encoder.wait_ready()
    assert await encoder.encode(["a", "b"]) is None
    assert "no such model directory" in caplog.text
    await asyncio.wait_for(encoder.close(), 5)
