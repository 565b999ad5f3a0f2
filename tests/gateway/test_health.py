"""Health, models, metrics, CORS: what operators and their tools read."""

from __future__ import annotations

import pytest
from gateway_fakes import ByteTokenizer, FakeBackend, Script
from prometheus_client.parser import text_string_to_metric_families

from pingjia.errors import UserError
from pingjia.gateway import GatewaySettings, create_app


def samples(gateway):
    """{(name, sorted labels): value} of /metrics."""
    text = gateway.http.get("/metrics").text
    return {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


@pytest.mark.parametrize(("ready", "status", "word"), [(True, 200, "ok"), (False, 503, "not ready")])
def test_health_tells_whether_a_token_could_come_out(gateway, ready, status, word):
    gateway.backend.ready = ready
    for path in ("/health", "/health/ready"):
        response = gateway.http.get(path)
        assert (response.status_code, response.json()["status"]) == (status, word)
    assert gateway.http.get("/health/live").status_code == 200


def test_models(gateway):
    models = gateway.openai().models.list().data
    assert [(m.id, m.object, m.owned_by, m.created) for m in models] == [
        ("base", "model", "pingjia", 1_700_000_000),
        ("shop", "model", "pingjia", 1_700_000_001),
    ]
    assert (models[1].root, models[1].parent, models[1].max_model_len) == ("/adapters/shop", "base", 4096)
    assert gateway.openai().models.retrieve("shop").id == "shop"


def test_a_model_that_is_not_there(gateway):
    error = gateway.http.get("/v1/models/org/name").json()["error"]
    assert error["code"] == "model_not_found"
    assert "org/name" in error["message"]


def test_model_ids_with_slashes(start):
    gateway = start(served_model_name="org/name")
    assert gateway.http.get("/v1/models/org/name").json()["id"] == "org/name"


def test_a_default_model_that_is_not_served_stops_the_start():
    with pytest.raises(UserError, match="base, shop"):
        create_app(FakeBackend(), ByteTokenizer(), GatewaySettings(default_model="x"))


def test_metrics_of_the_engine_are_its_stats(gateway):
    gateway.chat()
    found = samples(gateway)
    assert found[("pingjia_kv_cache_usage_perc",)] == 0.25
    assert found[("pingjia_generation_tokens_total",)] == 13
    names = ("num_requests_running", "num_requests_waiting", "prompt_tokens_total", "tokens_after_disconnect_total")
    assert all(found[(f"pingjia_{name}",)] == 0 for name in names)


def test_metrics_of_answers_and_errors(start):
    gateway = start()
    gateway.backend.script = Script(text="abc", token_s=0.02, first_s=0.05)
    gateway.chat(n=2)
    gateway.chat(max_tokens=2, model="shop")
    gateway.chat(temperature="hot")
    gateway.backend.script = Script(finish="error")
    gateway.chat()
    found = samples(gateway)
    base, shop = ("model_name", "base"), ("model_name", "shop")
    assert found[("pingjia_request_success_total", ("finished_reason", "stop"), base)] == 2
    assert found[("pingjia_request_success_total", ("finished_reason", "length"), shop)] == 1
    assert found[("pingjia_request_success_total", ("finished_reason", "error"), base)] == 1
    assert found[("pingjia_http_errors_total", ("status", "400"))] == 1
    assert found[("pingjia_http_errors_total", ("status", "500"))] == 1
    assert found[("pingjia_time_to_first_token_seconds_count", base)] == 3
    assert found[("pingjia_time_to_first_token_seconds_sum", shop)] >= 0.05
    assert found[("pingjia_time_per_output_token_seconds_count", shop)] == 1
    assert found[("pingjia_time_per_output_token_seconds_sum", shop)] >= 0.02
    assert found[("pingjia_e2e_request_latency_seconds_count", base)] == 2


def test_two_apps_have_their_own_numbers(start):
    one, two = start(), start()
    one.chat()
    key = ("pingjia_request_success_total", ("finished_reason", "stop"), ("model_name", "base"))
    assert samples(one)[key] == 1
    assert key not in samples(two)


def test_pages_of_other_origins_are_not_let_in(gateway):
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in gateway.http.options("/v1/chat/completions", headers=headers).headers
    assert "access-control-allow-origin" not in gateway.http.get("/v1/models", headers=headers).headers


def test_named_origins_are(start):
    gateway = start(cors_origins=("https://shop.example",), api_keys=("0" * 64,))
    headers = {"origin": "https://shop.example", "access-control-request-method": "POST"}
    preflight = gateway.http.options("/v1/chat/completions", headers=headers)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://shop.example"
    assert gateway.http.get("/v1/models", headers=headers).status_code == 401
