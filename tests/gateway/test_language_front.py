"""The language front module: short messages, conversations, rules, and what is said of it."""

from __future__ import annotations

import pytest
from gateway_fakes import FakeBackend, Script
from hypothesis import given
from hypothesis import strategies as st

from pingjia.gateway.language import language_of
from pingjia.gateway.settings import GatewaySettings
from pingjia.types import Message


def talk(*texts):
    """Turns of user and assistant, the user's first."""
    return [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (["你好"], "zh"),
        (["好"], "zh"),
        (["退货"], "zh"),
        (["多少钱?"], "zh"),
        (["iPhone 15 多少钱"], "zh"),
        (["hi"], "en"),
        (["refund?"], "en"),
        (["size M"], "en"),
        (["我想 cancel 我的 order"], "mixed"),
        (["Can you tell me 这个多少钱"], "mixed"),
        (["12345"], "und"),
        (["😀"], "und"),
        ([""], "und"),
        (["こんにちは"], "ja"),
        (["Где мой заказ?"], "ru"),
        (["Bonjour, où est ma commande ?"], "fr"),
    ],
)
def test_one_message(texts, language):
    assert language_of(talk(*texts)) == language


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (["你好", "您好，请问有什么可以帮您", "OK"], "zh"),
        (["这个多少钱", "99元", "iPhone 15 Pro"], "zh"),
        (["这个多少钱", "99元", "12"], "zh"),
        (["where is my order, please", "On its way.", "谢谢"], "zh"),  # Chinese characters are sure by themselves
        (["where is my order, please", "On its way.", "好的"], "zh"),
        (["where is my order, please", "On its way.", "👍"], "en"),
        (["你好", "您好", "please answer me in English from now on"], "en"),
        (["こんにちは、返品したいです", "はい", "了解"], "ja"),
        (["你好", "您好", "了解"], "zh"),
        (["123", "您好，请问有什么可以帮您", "ok"], "zh"),  # nothing by the user tells, so the assistant's words do
        (["我想退货", "好的", "ok", "请提供订单号", "A-12345"], "zh"),
        (["我想 cancel 我的 order", "好的", "thanks"], "mixed"),
        (["bonjour, je voudrais retourner un article", "Bien sûr.", "ok"], "fr"),
        (["ok", "yes", "no"], "en"),
    ],
)
def test_what_does_not_tell_follows_the_conversation(texts, language):
    assert language_of(talk(*texts)) == language


def test_only_a_system_message_says_nothing():
    assert language_of([Message("system", "你是客服")]) == "und"


@given(st.lists(st.text(max_size=30), max_size=6))
def test_it_always_answers(texts):
    found = language_of(talk(*texts))
    assert found in ("mixed", "und") or (len(found) == 2 and found.isalpha())


# ---- over HTTP


RULES = {
    "zh": {"model": "shop", "system": "用中文回答"},
    "en": {"system": "Answer in English."},
    "ja": {"model": "base"},
    "other": {"refuse": "Only 中文 and English, please."},
}


@pytest.fixture
def front(start):
    def make(**settings):
        backend = FakeBackend(Script(text=lambda r: bytes(i - 3 for i in r.prompt_ids if i > 2).decode()))
        return start(backend=backend, default_model="base", **settings)

    return make


def asked(gateway, content, **fields):
    response = gateway.chat(content, max_tokens=400, **fields)
    return (
        response.headers.get("x-language"),
        response.json()["model"],
        response.json()["choices"][0]["message"]["content"],
    )


def test_rules_choose_model_and_system_prompt(front):
    gateway = front(language={"rules": RULES})
    assert asked(gateway, "你好") == ("zh", "shop", "system: 用中文回答\nuser: 你好\nassistant: ")
    language, model, text = asked(gateway, "where is my order please")
    assert (language, model) == ("en", "base")
    assert text.startswith("system: Answer in English.\nuser: where")
    assert asked(gateway, "こんにちは")[:2] == ("ja", "base")
    assert asked(gateway, "我想 cancel 我的 order")[0] == "mixed"  # no rule of its own: as it is
    assert asked(gateway, "42") == ("und", "base", "user: 42\nassistant: ")


def test_a_refusal_computes_nothing(front):
    gateway = front(language={"rules": RULES})
    language, _, text = asked(gateway, "Где мой заказ?")
    assert (language, text) == ("ru", "Only 中文 and English, please.")
    assert gateway.backend.requests == []
    response = gateway.chat("Где мой заказ?", stream=True)
    assert response.headers["x-language"] == "ru"
    assert "Only" in response.text
    assert response.text.rstrip().endswith("data: [DONE]")


def test_a_refusal_in_numbers(front, tmp_path):
    from pingjia.ledger import Ledger

    gateway = front(language={"rules": RULES}, ledger=Ledger(tmp_path / "l.jsonl"))
    usage = gateway.chat("Где мой заказ?", n=2).json()["usage"]
    assert usage["completion_tokens"] == 2 * len("Only 中文 and English, please.".encode())
    (fact,) = gateway.ledger.read(kind="serve.request")
    assert (fact.note["refused"], fact.note["share_s"], fact.note["status"]) == ("language", 0, 200)


def test_the_clients_own_wishes_win(front):
    gateway = front(language={"rules": {"zh": {"model": "base", "system": "规则"}}})
    assert asked(gateway, "你好", model="shop")[1] == "shop"  # an adapter asked for by name
    messages = [{"role": "system", "content": "own"}, {"role": "user", "content": "你好"}]
    body = {"messages": messages, "max_tokens": 100}
    text = gateway.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert text == "system: own\nuser: 你好\nassistant: "


def test_a_request_without_a_model_is_routed(front):
    gateway = front(language={"rules": RULES})
    body = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 9}
    assert gateway.http.post("/v1/chat/completions", json=body).json()["model"] == "shop"


def test_without_rules_it_only_tells(front):
    gateway = front(language={"detect": True})
    assert asked(gateway, "你好") == ("zh", "base", "user: 你好\nassistant: ")
    asked(gateway, "Где мой заказ?")
    metrics = gateway.http.get("/metrics").text
    assert 'pingjia_requests_by_language_total{language="zh"} 1.0' in metrics
    assert 'pingjia_requests_by_language_total{language="other"} 1.0' in metrics


def test_off_by_default(front):
    assert asked(front(), "你好")[0] is None


def test_a_rule_for_a_model_that_is_not_there(front):
    gateway = front(language={"rules": {"zh": {"model": "gone"}}})
    response = gateway.chat("你好")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert gateway.chat("hello there my friend").status_code == 200


def test_completions_are_raw_text_and_are_left_alone(front):
    gateway = front(language={"rules": RULES})
    response = gateway.http.post("/v1/completions", json={"model": "base", "prompt": "Привет", "max_tokens": 5})
    assert "x-language" not in response.headers


@pytest.mark.parametrize(
    "rules", [{"chinese": {}}, {"ZH": {}}, {"zh": {"adapter": "x"}}, {"zh": {"system": ""}}, {"zh-CN": {}}]
)
def test_odd_rules_are_refused(rules):
    with pytest.raises(ValueError, match="language"):
        GatewaySettings(language={"rules": rules})


def test_a_key_may_not_reach_a_model_by_its_language(start, tmp_path):
    from pingjia.gateway.keys import KeyFile

    secret = KeyFile(tmp_path / "k.json").create("a", models=("base",)).secret
    gateway = start(
        keys_file=str(tmp_path / "k.json"), default_model="base", language={"rules": {"zh": {"model": "shop"}}}
    )
    gateway.http.headers["authorization"] = f"Bearer {secret}"
    assert gateway.chat("你好").status_code == 404
    assert gateway.chat("hello").status_code == 200


def test_a_refusal_is_given_at_once_also_where_the_client_would_wait(front):
    gateway = front(language={"rules": RULES})
    body = {"model": "base", "messages": [{"role": "user", "content": "Где мой заказ?"}]}
    response = gateway.http.post("/v1/chat/completions", json=body, headers={"prefer": "respond-async"})
    assert (response.status_code, response.json()["choices"][0]["message"]["content"][:4]) == (200, "Only")
