"""Keys held to their limits over HTTP: what is refused, with which words, headers and times."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import openai
import pytest
from gateway_fakes import Script

from pingjia.errors import EngineError, UserError
from pingjia.gateway.guard import duration
from pingjia.gateway.keys import KeyFile
from pingjia.ledger import Fact, Ledger


@pytest.fixture
def keyed(start, tmp_path):
    """keyed(settings of the server, **limits of the key): a server and a client with that key."""

    def make(ledger=None, spent=None, **limits):
        secret = KeyFile(tmp_path / "keys.json").create("a", **limits).secret
        gateway = start(ledger=ledger, spent=spent, keys_file=str(tmp_path / "keys.json"))
        gateway.http.headers["authorization"] = f"Bearer {secret}"
        gateway.secret = secret
        return gateway

    return make


def error(response):
    body = response.json()["error"]
    return response.status_code, body["type"], body["code"]


def test_requests_a_minute(keyed):
    gateway = keyed(requests_per_minute=3)
    answers = [gateway.chat() for _ in range(4)]
    assert [a.status_code for a in answers] == [200, 200, 200, 429]
    assert error(answers[-1]) == (429, "requests", "rate_limit_exceeded")
    assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == ["2", "1", "0", "0"]
    assert {a.headers["x-ratelimit-limit-requests"] for a in answers} == {"3"}
    assert 0 < int(answers[-1].headers["retry-after"]) <= 120
    assert answers[-1].headers["x-ratelimit-reset-requests"].endswith("s")
    assert "come back in" in answers[-1].json()["error"]["message"]
    assert len(gateway.backend.requests) == 3


def test_streams_have_the_headers_too(keyed):
    gateway = keyed(requests_per_minute=3, tokens_per_minute=1000)
    answer = gateway.chat(stream=True, max_tokens=5)
    assert answer.headers["x-ratelimit-remaining-requests"] == "2"
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 1000


def test_without_limits_there_are_no_such_headers(gateway):
    assert not [name for name in gateway.chat().headers if name.startswith("x-ratelimit")]


def test_tokens_are_reserved_and_what_was_not_used_comes_back(keyed):
    gateway = keyed(tokens_per_minute=300)
    gateway.backend.script = Script(text="abc")
    first = gateway.chat(max_tokens=200)
    num_prompt = first.json()["usage"]["prompt_tokens"]
    assert int(first.headers["x-ratelimit-remaining-tokens"]) == 300 - 200 - num_prompt
    second = gateway.chat(max_tokens=200)
    used = first.json()["usage"]["total_tokens"]
    assert second.status_code == 200
    assert int(second.headers["x-ratelimit-remaining-tokens"]) == 300 - used - 200 - num_prompt


def test_tokens_used_up(keyed):
    gateway = keyed(tokens_per_minute=300)
    gateway.backend.script = Script(text="x" * 240)
    assert gateway.chat(max_tokens=240).status_code == 200
    refused = gateway.chat(max_tokens=240)
    assert error(refused) == (429, "tokens", "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) >= 1
    assert gateway.chat(max_tokens=5).status_code == 200  # a smaller one still fits


def test_what_can_never_fit_is_not_to_be_tried_again(keyed):
    gateway = keyed(tokens_per_minute=300)
    refused = gateway.chat(max_tokens=400)
    assert error(refused) == (429, "tokens", "rate_limit_exceeded")
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    assert "smaller max_tokens" in refused.json()["error"]["message"]


def test_a_failed_answer_gives_its_tokens_back(keyed):
    gateway = keyed(tokens_per_minute=300)
    gateway.backend.script = Script(text="abc", raise_after=1, error=EngineError("broken"))
    assert gateway.chat(max_tokens=250).status_code == 500
    gateway.backend.script = Script(text="abc")
    assert gateway.chat(max_tokens=250).status_code == 200


def test_answers_at_once(keyed, eventually):
    gateway = keyed(max_concurrent=2)
    gateway.backend.script = Script(text="ok", held=True)
    statuses = []
    threads = [threading.Thread(target=lambda: statuses.append(gateway.chat().status_code)) for _ in range(2)]
    for thread in threads:
        thread.start()
    eventually(lambda: gateway.backend.running == 2, "both run")
    refused = gateway.chat()
    assert error(refused) == (429, "concurrency", "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) >= 1
    gateway.backend.script.held = False
    for thread in threads:
        thread.join()
    assert statuses == [200, 200]
    assert gateway.chat(n=2).status_code == 200
    assert error(gateway.chat(n=3)) == (429, "concurrency", "rate_limit_exceeded")


def test_a_client_that_leaves_frees_its_place(keyed, eventually):
    gateway = keyed(max_concurrent=1)
    gateway.backend.script = Script(text="abc", freeze_after=1)
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    eventually(lambda: gateway.backend.running == 0, "it ended")
    gateway.backend.script = Script(text="abc")
    assert gateway.chat().status_code == 200


def test_the_budget(keyed, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    spent = [0.0]
    gateway = keyed(ledger=ledger, spent=lambda key_id: spent[0], monthly_budget_cny=1.5)
    assert gateway.chat().status_code == 200
    spent[0] = 1.5
    refused = gateway.chat()
    assert error(refused) == (429, "insufficient_quota", "insufficient_quota")
    assert refused.headers["x-should-retry"] == "false"
    assert "1.5000 of the 1.5 yuan" in refused.json()["error"]["message"]
    with pytest.raises(openai.RateLimitError, match="has spent") as e:
        gateway.openai(api_key=gateway.secret, max_retries=3).chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hi"}]
        )
    assert (e.value.code, e.value.type) == ("insufficient_quota", "insufficient_quota")
    assert len(gateway.backend.requests) == 1


def test_the_budget_counts_what_the_ledger_says(keyed, tmp_path):
    """The whole way: answers cost time, their facts are priced, and the next request is refused."""
    from pingjia.cli.budgets import spent_by_key
    from pingjia.cost.settings import CostSettings
    from pingjia.gateway.settings import GatewaySettings

    ledger = Ledger(tmp_path / "ledger.jsonl")
    settings = GatewaySettings(keys_file=str(tmp_path / "keys.json"))
    spent = spent_by_key(settings, CostSettings(price_per_hour=3600), ledger.path)  # a yuan a second
    gateway = keyed(ledger=ledger, spent=spent, monthly_budget_cny=0.3)
    gateway.backend.script = Script(text="abc", first_s=0.2)
    assert [gateway.chat().status_code for _ in range(3)] == [200, 200, 429]


def test_others_do_not_pay(keyed, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    now = datetime.now(UTC).isoformat()
    ledger.append(Fact("serve.request", at=now, seconds=9e9, who="somebody"))
    gateway = keyed(ledger=ledger, spent=lambda key_id: 9e9 if key_id == "somebody" else 0.0, monthly_budget_cny=1.0)
    assert gateway.chat().status_code == 200


def test_a_budget_needs_a_ledger(keyed):
    with pytest.raises(UserError, match="--ledger"):
        keyed(monthly_budget_cny=1.0)


def test_a_budget_given_later_needs_one_too(keyed, tmp_path):
    gateway = keyed()
    secret = KeyFile(tmp_path / "keys.json").create("b", monthly_budget_cny=1.0).secret
    gateway.http.headers["authorization"] = f"Bearer {secret}"
    assert error(gateway.chat()) == (429, "insufficient_quota", "insufficient_quota")


def test_only_the_models_of_the_key(keyed):
    gateway = keyed(models=("shop",))
    assert gateway.chat(model="shop").status_code == 200
    refused = gateway.chat(model="base")
    assert error(refused) == (404, "invalid_request_error", "model_not_found")
    assert [m["id"] for m in gateway.http.get("/v1/models").json()["data"]] == ["shop"]


def test_the_share_of_the_machine_is_noted(start, tmp_path):
    gateway = start(ledger=Ledger(tmp_path / "ledger.jsonl"))
    gateway.backend.script = Script(text="abc", first_s=0.3)
    threads = [threading.Thread(target=gateway.chat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    facts = list(gateway.ledger.read(kind="serve.request"))
    assert sum(f.seconds for f in facts) > 4 * 0.29
    assert 0.29 < sum(f.note["share_s"] for f in facts) < 0.9 * sum(f.seconds for f in facts)
    assert "pingjia_compute_seconds_total" in gateway.http.get("/metrics").text


def test_a_key_keeps_its_rank(keyed):
    from pingjia.gateway.keys import Key
    from pingjia.gateway.routes import _rank

    assert [_rank(Key(id="", priority=p)) for p in (-3, 0, 5)] == ["low", "normal", "high"]


def test_limits_are_shared_over_redis_and_survive_it(start, tmp_path, redis):
    file = KeyFile(tmp_path / "keys.json")
    secret = file.create("a", requests_per_minute=4).secret
    gateways = [start(keys_file=str(file.path), redis_url=redis.url) for _ in range(2)]
    for gateway in gateways:
        gateway.http.headers["authorization"] = f"Bearer {secret}"
    statuses = [gateway.chat(max_tokens=3).status_code for _ in range(3) for gateway in gateways]
    assert statuses == [200] * 4 + [429] * 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.25, "250ms"), (1.5, "1.5s"), (59, "59s"), (60, "1m0s"), (119.6, "1m59.6s")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
