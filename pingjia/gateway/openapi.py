"""What FastAPI does not know of this API and the OpenAPI document must say: headers, ranges, and what leads where.

Bodies and statuses are declared beside the endpoints. Not here: any behaviour.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from pingjia.types import RANGES

Document = dict[str, Any]

_TEXT: Document = {"type": "string"}
_WHOLE_NUMBER: Document = {"type": "string", "pattern": "^[0-9]+$"}
_DURATION: Document = {"type": "string", "pattern": "^([0-9]+m)?[0-9.]+(ms|s)$"}


def _header(about: str, schema: Document, *, required: bool = False) -> Document:
    return {"description": about, "schema": schema, "required": required}


_LIMITS = {
    f"x-ratelimit-{part}-{what}": _header(f"{about} of {what} of the key", schema)
    for what in ("requests", "tokens")
    for part, about, schema in (
        ("limit", "the limit per minute", _WHOLE_NUMBER),
        ("remaining", "what is left", _WHOLE_NUMBER),
        ("reset", "time until all is there again", _DURATION),
    )
}
RESPONSE_HEADERS: dict[str, Document] = {
    "x-request-id": _header("names the request in the log; the client's own, if it sent a harmless one", _TEXT),
    "x-cache": _header(
        "whether the answer was kept, computed, or is of a kind that is not kept",
        {"type": "string", "enum": ["HIT", "MISS", "BYPASS"]},
    ),
    "age": _header("seconds since a kept answer was computed", _WHOLE_NUMBER),
    "x-language": _header("the language of the last message, with serve.language", _TEXT),
    "location": _header("the job", {"type": "string", "pattern": "^/v1/jobs/"}, required=True),
    "preference-applied": _header("what was asked with Prefer", {"type": "string", "enum": ["respond-async"]}),
    "retry-after": _header("seconds after which asking again makes sense, computed", _WHOLE_NUMBER),
    "x-should-retry": _header("false where asking again does not help", {"type": "string", "enum": ["false"]}),
    "www-authenticate": _header("the scheme", {"type": "string", "enum": ["Bearer"]}, required=True),
    **_LIMITS,
}
_EVERYWHERE = ("x-request-id",)
_WITH_ANSWERS = ("x-cache", "age", "x-language", *_LIMITS)
_WITH_STATUS = {
    "202": ("location", "preference-applied"),
    "401": ("www-authenticate",),
    "429": ("retry-after", "x-should-retry"),
    "503": ("retry-after",),
    "504": ("x-should-retry",),
}
ANSWERING = ("/v1/chat/completions", "/v1/completions", "/")
_ASYNCHRONOUS = ANSWERING[:2]
_ANY = {"model_id": ".+"}

_REQUEST_ID = {
    "name": "x-request-id",
    "in": "header",
    "required": False,
    "description": "an id of the client's own for the log; used if it is 1 to 128 letters, digits and . _ : -",
    "schema": _TEXT,
}
_CACHE_CONTROL = {
    "name": "cache-control",
    "in": "header",
    "required": False,
    "description": "no-cache: compute anew; max-age=N: take a kept answer of at most N s; no-store: keep nothing",
    "schema": _TEXT,
}
_PREFER = {
    "name": "prefer",
    "in": "header",
    "required": False,
    "description": "respond-async: 202 and a job instead of the answer; not with stream: true",
    "schema": _TEXT,
}
_IDEMPOTENCY = {
    "name": "idempotency-key",
    "in": "header",
    "required": False,
    "description": "with Prefer: respond-async: the same key again is the same job",
    "schema": _TEXT,
}


_LINKS = (  # (method, path) and status whose answer has an id -> what can be asked about it
    ("post", "/v1/files", "200", ("get", "delete"), "/v1/files/{id}"),
    ("post", "/v1/files", "200", ("get",), "/v1/files/{id}/content"),
    ("post", "/v1/batches", "200", ("get",), "/v1/batches/{id}"),
    ("post", "/v1/batches", "200", ("post",), "/v1/batches/{id}/cancel"),
    *(("post", path, "202", ("get", "delete"), "/v1/jobs/{id}") for path in _ASYNCHRONOUS),
)
# What is checked later than the types, because other roads into the engine need the same checks.
_BOUNDS: dict[tuple[str, str], Document] = {
    ("ChatBody", "messages"): {"minItems": 1},
    ("ChatBody", "tools"): {"maxItems": 128},
    ("DetokenizeBody", "tokens"): {"items": {"type": "integer", "minimum": 0}},
}


def complete(document: Document) -> Document:
    """The document with all of it, and only the statuses that are declared one by one."""
    document["components"]["headers"] = dict(RESPONSE_HEADERS)
    _bound(document["components"]["schemas"])
    _link(document["paths"])
    for path, operation in _operations(document):
        operation["parameters"] = [*operation.get("parameters", ()), *_parameters(path)]
        # Named so that FastAPI declares no 422, which is never sent.
        operation["responses"].pop("default", None)
        for status, response in operation["responses"].items():
            names = (*_EVERYWHERE, *_WITH_STATUS.get(status, ()), *(_WITH_ANSWERS if path in ANSWERING else ()))
            response["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in dict.fromkeys(names)}
    return document


def _bound(schemas: Document) -> None:
    for model in ("ChatBody", "CompletionBody", "DemoBody"):
        fields = schemas.get(model, {}).get("properties", {})
        for name, low, high in RANGES:
            _narrow(fields.get(name, {}), {"minimum": low, "maximum": high})
        _narrow(fields.get("top_k", {}), {"minimum": -1})  # as vLLM has it: no limit
    for (model, name), bounds in _BOUNDS.items():
        _narrow(schemas.get(model, {}).get("properties", {}).get(name, {}), bounds)


def _narrow(field: Document, bounds: Document) -> None:
    for variant in (field, *field.get("anyOf", ())):
        if variant.get("type") in ("integer", "number", "array"):
            variant.update(bounds)


def _link(paths: Document) -> None:
    for method, path, status, others, target in _LINKS:
        response = paths.get(path, {}).get(method, {}).get("responses", {}).get(status)
        for other in others if response is not None else ():
            operation = paths[target][other]["operationId"]
            response.setdefault("links", {})[operation] = {
                "operationId": operation, "parameters": {"id": "$response.body#/id"},
            }  # fmt: skip


def methods_of(document: Document, path: str) -> tuple[str, ...]:
    """What may be done with a path, in capitals."""
    items = [item for known, item in document["paths"].items() if _pattern(known).fullmatch(path)]
    return tuple(sorted({method.upper() for item in items for method in item}))


@cache
def _pattern(path: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", path)
    # Only the name of a model may hold slashes.
    return re.compile("".join(re.escape(p) if i % 2 == 0 else _ANY.get(p, "[^/]+") for i, p in enumerate(parts)))


def _operations(document: Document) -> Iterator[tuple[str, Document]]:
    for path, item in document["paths"].items():
        for operation in item.values():
            yield path, operation


def _parameters(path: str) -> Iterator[Document]:
    yield _REQUEST_ID
    if path in ANSWERING:
        yield _CACHE_CONTROL
    if path in _ASYNCHRONOUS:
        yield _PREFER
        yield _IDEMPOTENCY
