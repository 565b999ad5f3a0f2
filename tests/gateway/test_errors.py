"""Every way to be wrong outside the fields of a body, and what a client is told."""

from __future__ import annotations

import json

import pytest

from pingjia.errors import EngineError, ModelError, Overloaded, RequestError
from pingjia.gateway.errors import describe, respond


@pytest.mark.parametrize("path", ["/v1/nothing", "/favicon.ico", "/v1/chat/completions/", "/docs", "/%F0%28/x"])
def test_unknown_paths_are_404(gateway, path):
    response = gateway.http.get(path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_endpoint")


@pytest.mark.parametrize(("method", "path", "allow"), [("GET", "/v1/chat/completions", "POST"), ("PUT", "/", "POST")])
def test_wrong_methods_are_405(gateway, method, path, allow):
    response = gateway.http.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == allow
    assert allow in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_body"),
        (b"{", "invalid_json"),
        (b'{"model": }', "invalid_json"),
        (b"[]", "invalid_body"),
        (b"5", "invalid_body"),
        (b"null", "invalid_body"),
        (b'"\xff"', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"model": "base", "seed": ' + b"9" * 5000 + b"}", "invalid_json"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/"])
def test_bodies_that_are_no_json_object(gateway, body, code, path):
    response = gateway.http.post(path, content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "", "text/json"])
def test_other_content_types_are_415(gateway, kind):
    response = gateway.http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": kind})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert "application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/x+json"])
def test_json_content_types_are_read(gateway, kind):
    body = json.dumps({"model": "base", "prompt": "x"})
    assert gateway.http.post("/v1/completions", content=body, headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize(("field", "status"), [("content", 400), ("role", 400), ("model", 404), ("stop", 400)])
def test_half_surrogates_are_refused_in_valid_utf8(gateway, field, status):
    body = {"model": "base", "messages": [{"role": "user", "content": "\ud83d"}]}
    if field in ("model", "stop"):
        body = {"model": "base", "messages": [{"role": "user", "content": "x"}], field: "\ud83d"}
    elif field == "role":
        body["messages"][0] = {"role": "\ud83d", "content": "x"}
    response = gateway.http.post(
        "/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert response.status_code == status
    assert response.json()["error"]["param"].startswith(("messages", field))


def test_an_exception_nobody_foresaw_is_500_without_its_text(gateway, monkeypatch, caplog):
    def broken():
        raise RuntimeError("secret detail")

    monkeypatch.setattr(gateway.backend, "models", broken)
    response = gateway.http.get("/v1/models", headers={"x-request-id": "abc-1"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.headers["x-request-id"] == "abc-1"
    assert "secret detail" in caplog.text
    assert "abc-1" in caplog.text


@pytest.mark.parametrize("given", ["my-id_1.2:3", "a" * 128])
def test_a_harmless_request_id_is_kept(gateway, given):
    assert gateway.http.get("/health", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "<script>", '{"a":1}'])
def test_any_other_request_id_is_replaced(gateway, given):
    made = gateway.http.get("/health", headers={"x-request-id": given}).headers["x-request-id"]
    assert made != given
    assert len(made) == 32


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("x", param="p", code="c"), 400, "c"),
        (Overloaded("x", retry_after_s=0.2), 503, "overloaded"),
        (EngineError("x"), 500, "engine_error"),
        (ModelError("/secret/path is broken"), 500, None),  # the operator's to put right, not the client's
        (ValueError("secret"), 500, None),
    ],
)
def test_describe(error, status, code):
    failure = describe(error)
    assert (failure.status, failure.code) == (status, code)
    assert "secret" not in failure.message
    assert set(failure.envelope()["error"]) == {"message", "type", "param", "code"}


def test_retry_after_is_rounded_up_to_whole_seconds():
    assert describe(Overloaded("x", retry_after_s=0.2)).headers == {"retry-after": "1"}
    assert describe(Overloaded("x", retry_after_s=4.1)).headers == {"retry-after": "5"}


def test_half_surrogates_in_a_message_do_not_break_the_error_response():
    assert respond(RequestError("bad \ud83d")).body == (
        b'{"error":{"message":"bad \\\\ud83d","type":"invalid_request_error","param":null,"code":null}}'
    )
