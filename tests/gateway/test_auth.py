"""Keys: who gets in, and that nobody's key is written anywhere."""

from __future__ import annotations

import logging

import openai
import pytest
from gateway_fakes import ByteTokenizer, FakeBackend

from pingjia.errors import UserError
from pingjia.gateway import GatewaySettings, create_app, hash_key
from pingjia.gateway.auth import KeyRing, load_keys
from pingjia.ledger import Ledger

KEY = "sk-平价-1"
KEY_ID = hash_key(KEY)[:12]


@pytest.fixture(scope="module")
def guarded(start_for_module, tmp_path_factory):
    ledger = Ledger(tmp_path_factory.mktemp("auth") / "ledger.jsonl")
    return start_for_module(ledger=ledger, api_keys=(hash_key("sk-other"), hash_key("sk-good").upper()))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic sk-good"},
        {"authorization": "sk-good"},
        {"authorization": "Bearer sk-good extra"},
        {"authorization": b"Bearer \xff\xfe"},
        {"x-api-key": "sk-good"},
    ],
)
@pytest.mark.parametrize(
    "call", [("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/"), ("GET", "/x")]
)
def test_refused(guarded, headers, call):
    response = guarded.http.request(*call, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_health_needs_no_key(guarded, path):
    assert guarded.http.get(path).status_code == 200


def test_the_right_key_gets_in_and_only_its_hash_is_written(guarded, caplog, eventually):
    caplog.set_level(logging.INFO, "pingjia.access")
    client = guarded.openai(api_key="sk-good")
    client.chat.completions.create(model="base", messages=[{"role": "user", "content": "my secret question"}])
    fact = next(guarded.ledger.read(kind="serve.request"))
    assert fact.who == hash_key("sk-good")[:12]
    eventually(lambda: "/v1/chat/completions" in caplog.text, "the access log line, which follows the response")
    written = guarded.ledger.path.read_text() + caplog.text
    assert fact.who in caplog.text
    assert "sk-good" not in written
    assert hash_key("sk-good") not in written
    assert "secret question" not in written


def test_openai_client_sees_an_authentication_error(guarded):
    with pytest.raises(openai.AuthenticationError, match="not known here"):
        guarded.openai(api_key="sk-bad").models.list()


def test_keys_of_the_environment(monkeypatch):
    settings = GatewaySettings(api_keys=(hash_key("a"),), api_keys_env="MY_KEYS")
    ring = load_keys(settings, {"MY_KEYS": f" b,c\n {KEY},, b"})
    assert len(ring) == 4
    assert [ring.identify(k.encode()) is not None for k in ("a", "b", "c", KEY, "d", "")] == [True] * 4 + [False] * 2
    assert ring.identify(KEY.encode()) == KEY_ID


def test_an_empty_ring_knows_nobody():
    assert KeyRing().identify(b"x") is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "myhost"])
def test_listening_wider_needs_keys(host, monkeypatch):
    monkeypatch.delenv("PINGJIA_API_KEYS", raising=False)
    with pytest.raises(UserError, match="API keys are required") as e:
        create_app(FakeBackend(), ByteTokenizer(), GatewaySettings(host=host))
    assert "PINGJIA_API_KEYS" in str(e.value)
    monkeypatch.setenv("PINGJIA_API_KEYS", "k")
    create_app(FakeBackend(), ByteTokenizer(), GatewaySettings(host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_none(host):
    assert len(load_keys(GatewaySettings(host=host), {})) == 0


def test_a_key_in_the_clear_is_refused_without_repeating_it():
    with pytest.raises(UserError, match="sha256sum") as e:
        load_keys(GatewaySettings(api_keys=("sk-in-the-clear",)), {})
    assert "in-the-clear" not in str(e.value)
