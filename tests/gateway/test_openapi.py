"""The OpenAPI document says what the server does: every answer and error it gives fits what is declared."""

from __future__ import annotations

import json

import pytest
from gateway_fakes import Script

from pingjia.gateway import responses

MODELS = {name: model for name, model in vars(responses).items() if isinstance(model, type)}


@pytest.fixture
def document(gateway):
    return gateway.http.get("/openapi.json").json()


def declared(document, method, path, status, kind="application/json"):
    """The response model declared for a status."""
    responses_ = document["paths"][path][method]["responses"]
    schema = responses_[str(status)]["content"][kind]["schema"]
    if kind == "text/event-stream":
        schema = schema["properties"]["data"]["anyOf"][0]["contentSchema"]["anyOf"][0]
    return MODELS[schema["$ref"].rsplit("/", 1)[1]]


def test_every_reference_resolves(document):
    def refs(node):
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for child in node.values():
                yield from refs(child)
        elif isinstance(node, list):
            for child in node:
                yield from refs(child)

    found = set(refs(document))
    assert "#/components/schemas/ChatChunk" in found
    for ref in found:
        node = document
        for part in ref.removeprefix("#/").split("/"):
            node = node[part]


def test_all_endpoints_are_there_and_422_is_nowhere(document):
    assert {(m, p) for p, item in document["paths"].items() for m in item} == {
        ("post", "/v1/chat/completions"),
        ("post", "/v1/completions"),
        ("post", "/"),
        ("get", "/v1/models"),
        ("get", "/v1/models/{model_id}"),
        ("get", "/health"),
        ("get", "/health/live"),
        ("get", "/health/ready"),
        ("get", "/metrics"),
        ("post", "/v1/load_lora_adapter"),
        ("post", "/v1/unload_lora_adapter"),
        ("post", "/tokenize"),
        ("post", "/detokenize"),
        ("delete", "/v1/cache"),
        ("post", "/v1/files"),
        ("get", "/v1/files"),
        ("get", "/v1/files/{id}"),
        ("delete", "/v1/files/{id}"),
        ("get", "/v1/files/{id}/content"),
        ("post", "/v1/batches"),
        ("get", "/v1/batches"),
        ("get", "/v1/batches/{id}"),
        ("post", "/v1/batches/{id}/cancel"),
        ("get", "/v1/jobs/{id}"),
        ("delete", "/v1/jobs/{id}"),
    }
    assert "422" not in json.dumps(document)
    assert "HTTPValidationError" not in document["components"]["schemas"]


CHAT = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
RAW = {"model": "base", "prompt": "x"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("post", "/v1/chat/completions", CHAT, 200),
        ("post", "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2}, 200),
        ("post", "/v1/chat/completions", {**CHAT, "n": 0}, 400),
        ("post", "/v1/chat/completions", {**CHAT, "model": "x"}, 404),
        ("post", "/v1/completions", {**RAW, "logprobs": 1}, 200),
        ("post", "/v1/completions", {}, 400),
        ("post", "/", RAW, 200),
        ("post", "/", {}, 400),
        ("get", "/v1/models", None, 200),
        ("get", "/health", None, 200),
        ("get", "/health/live", None, 200),
    ],
)
def test_answers_are_what_is_declared(gateway, document, method, path, body, status):
    response = gateway.http.request(method, path, json=body)
    assert response.status_code == status
    declared(document, method, path, status).model_validate_json(response.content)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("script", [Script(), Script(text="abc", raise_after=1)])
def test_events_are_what_is_declared(gateway, document, path, script):
    gateway.backend.script = script
    body = {**(CHAT if "chat" in path else RAW), "stream": True, "stream_options": {"include_usage": True}}
    model = declared(document, "post", path, 200, "text/event-stream")
    lines = [line[6:] for line in gateway.http.post(path, json=body).text.split("\n") if line]
    for line in lines[:-1]:
        (responses.ErrorEnvelope if '"error"' in line else model).model_validate_json(line)
    assert lines[-1] == "[DONE]"


def test_a_backend_that_is_not_ready_is_declared(gateway, document):
    gateway.backend.ready = False
    declared(document, "get", "/health/ready", 503).model_validate_json(gateway.http.get("/health/ready").content)
    response = gateway.chat()
    declared(document, "post", "/v1/chat/completions", 503).model_validate_json(response.content)


def test_the_key_scheme_is_declared_only_where_keys_are_required(start):
    guarded = start(api_keys=("0" * 64,))
    schema = guarded.app.openapi()
    assert schema["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert schema["paths"]["/v1/models"]["get"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in schema["paths"]["/health"]["get"]
    assert "securitySchemes" not in start().app.openapi()["components"]


def test_request_fields_are_declared_with_their_types(document):
    fields = document["components"]["schemas"]["ChatBody"]["properties"]
    assert {"type": "number", "minimum": 0.0, "maximum": 2.0} in fields["temperature"]["anyOf"]
    assert document["components"]["schemas"]["ChatBody"]["required"] == ["messages"]
    assert {"response_format", "logit_bias"} < set(fields)
    assert {"tools", "tool_choice"} < set(fields)
