"""Exceptions -> HTTP status and OpenAI's error envelope. The only place that maps them.

Messages written on purpose (`pingjia.errors`) are shown; anything else becomes a 500 without its text, and is logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pingjia.errors import (
    EngineError,
    ModelNotFound,
    Overloaded,
    PingjiaError,
    RequestError,
    StorageError,
    UpstreamBusy,
    UpstreamFailed,
)
from pingjia.gateway.openapi import methods_of
from pingjia.queue.policy import ShareExceeded
from pingjia.queue.protocol import QueueLost

log = logging.getLogger("pingjia.gateway")

CLIENT_CLOSED = 499
"""nginx's number for a client that left before its answer; only in logs, metrics and the ledger."""


class Unauthorized(PingjiaError):
    """No key, or none that we know. HTTP 401."""


class JobNotFound(PingjiaError):
    """No job, batch or file of that id is this tenant's. HTTP 404."""


class IdempotencyConflict(PingjiaError):
    """The same Idempotency-Key with another body. HTTP 409."""


class BodyTooLarge(PingjiaError):
    """HTTP 413."""


class BodyTooSlow(PingjiaError):
    """HTTP 408."""


class WrongContentType(PingjiaError):
    """HTTP 415."""


class RateLimited(PingjiaError):
    """The key has used up one of its limits. HTTP 429. kind: requests, tokens or concurrency; no time: never."""

    def __init__(self, message: str, *, kind: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s


class Forbidden(PingjiaError):
    """The key is known and may not do this. HTTP 403."""


class QuotaExceeded(PingjiaError):
    """The key's budget of this month is spent. HTTP 429, and asking again does not help."""


class NotReady(PingjiaError):
    """No token could come out now: starting, frozen or draining. HTTP 503 without a time to come back."""


class AnswerCancelled(PingjiaError):
    """The server ended the answer, not the client. HTTP 503."""


class DeadlineExceeded(PingjiaError):
    """The answer took longer than a request may. HTTP 504."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception as a client sees it."""

    status: int
    message: str
    type: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def envelope(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


_PLAIN: dict[type[Exception], tuple[int, str, str]] = {
    Unauthorized: (401, "authentication_error", "invalid_api_key"),
    JobNotFound: (404, "invalid_request_error", "not_found"),
    IdempotencyConflict: (409, "invalid_request_error", "idempotency_conflict"),
    StorageError: (507, "server_error", "storage_full"),
    BodyTooSlow: (408, "invalid_request_error", "body_timeout"),
    BodyTooLarge: (413, "invalid_request_error", "body_too_large"),
    WrongContentType: (415, "invalid_request_error", "unsupported_media_type"),
    UpstreamFailed: (502, "server_error", "upstream_failed"),
    EngineError: (500, "server_error", "engine_error"),
    Forbidden: (403, "invalid_request_error", "insufficient_permissions"),
    QuotaExceeded: (429, "insufficient_quota", "insufficient_quota"),
    NotReady: (503, "server_error", "not_ready"),
    QueueLost: (503, "server_error", "queue_unreachable"),
    AnswerCancelled: (503, "server_error", "cancelled"),
    DeadlineExceeded: (504, "server_error", "deadline_exceeded"),
}
_NO_RETRY = {"x-should-retry": "false"}
_HEADERS: dict[type[Exception], dict[str, str]] = {
    Unauthorized: {"www-authenticate": "Bearer"},
    BodyTooSlow: {"connection": "close"},
    # OpenAI's client would ask twice more, and each time a whole deadline of work would be lost.
    DeadlineExceeded: _NO_RETRY,
    QuotaExceeded: _NO_RETRY,
}


def describe(exc: BaseException) -> Failure:
    """What a client is told of `exc`. Never raises."""
    if isinstance(exc, RequestError):
        status = 404 if isinstance(exc, ModelNotFound) else 400
        return Failure(status, _clean(str(exc)), "invalid_request_error", exc.code, exc.param)
    if isinstance(exc, Overloaded):
        headers = {"retry-after": str(max(1, ceil(exc.retry_after_s)))}
        if isinstance(exc, UpstreamBusy) and exc.status == 429:
            return Failure(429, _clean(str(exc)), "rate_limit_error", "rate_limit_exceeded", headers=headers)
        if isinstance(exc, ShareExceeded):
            return Failure(429, _clean(str(exc)), "rate_limit_error", "queue_share_exceeded", headers=headers)
        return Failure(503, _clean(str(exc)), "server_error", "overloaded", headers=headers)
    if isinstance(exc, RateLimited):
        headers = _NO_RETRY if exc.retry_after_s is None else {"retry-after": str(max(1, ceil(exc.retry_after_s)))}
        return Failure(429, _clean(str(exc)), exc.kind, "rate_limit_exceeded", headers=headers)
    if isinstance(exc, RequestValidationError):
        return _describe_validation(exc)
    for cls, (status, kind, code) in _PLAIN.items():
        if isinstance(exc, cls):
            return Failure(status, _clean(str(exc)), kind, code, headers=_HEADERS.get(cls, {}))
    return Failure(500, "the server failed; its log has the details under this request's x-request-id", "server_error")


def status_of(exc: BaseException | None) -> int:
    """The HTTP status an ending amounts to; 200 for none, 499 when the client went away."""
    if exc is None:
        return 200
    if isinstance(exc, asyncio.CancelledError | ClientDisconnect):
        return CLIENT_CLOSED
    return describe(exc).status


def respond(exc: BaseException) -> Response:
    """The whole error response."""
    failure = describe(exc)
    return JSONResponse(failure.envelope(), status_code=failure.status, headers=dict(failure.headers))


def log_if_ours(exc: BaseException, request_id: str) -> None:
    """Log what is a fault of the server and not of the request; the traceback only when nobody foresaw it."""
    if describe(exc).status != 500:
        return
    if isinstance(exc, EngineError):
        log.error("request %s: engine error: %s", request_id, exc)
    else:
        log.error("request %s: unexpected %s", request_id, type(exc).__name__, exc_info=exc)


def _clean(text: str) -> str:
    """Half surrogates (legal in Python strings, not in UTF-8) must not break the error response itself."""
    return text.encode("utf-8", "backslashreplace").decode()


def _describe_validation(exc: RequestValidationError) -> Failure:
    errors = exc.errors()
    first = errors[0]
    loc = first["loc"][1:]
    if first["type"] == "json_invalid":
        message = f"the body is not valid JSON: {first['ctx']['error']} at character {loc[0]}"
        return Failure(400, _clean(message), "invalid_request_error", "invalid_json")
    if not loc:
        message = "the body is empty" if first["type"] == "missing" else "the body is not a JSON object"
        return Failure(400, f"{message}; send a JSON object", "invalid_request_error", "invalid_body")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    return Failure(400, _clean(f"{param}: {_reason(first)}"), "invalid_request_error", "invalid_value", _clean(param))


def _reason(error: Mapping[str, Any]) -> str:
    if error["type"] == "missing":
        return "missing; this field is required"
    found = repr(error["input"])
    found = found if len(found) <= 60 else found[:57] + "..."
    message = str(error["msg"])
    return f"{message[0].lower()}{message[1:]}, not {found}"


async def _on_error(request: Request, exc: Exception) -> Response:
    log_if_ours(exc, request.scope["state"].get("request_id", "-"))
    return respond(exc)


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    allowed = methods_of(request.app.openapi(), request.url.path) if exc.status_code == 405 else ()
    failure = _describe_routing(exc, request.method, request.url.path, allowed)
    return JSONResponse(failure.envelope(), status_code=failure.status, headers=dict(failure.headers))


def _describe_routing(exc: HTTPException, method: str, path: str, allowed: Sequence[str]) -> Failure:
    """`allowed`: all methods of the path; the router itself names those of the first endpoint it comes across."""
    headers = {"allow": ", ".join(allowed)} if allowed else {}
    if exc.status_code == 404:
        message, code = f"{path}: no such endpoint; GET /openapi.json lists them", "unknown_endpoint"
    elif exc.status_code == 405:
        message, code = f"{path}: {method} is not allowed here; use {' or '.join(allowed)}", "method_not_allowed"
    else:  # FastAPI's word for a body that is neither JSON nor UTF-8, or is nested too deeply
        message, code = "the body cannot be read as JSON", "invalid_json"
    return Failure(exc.status_code, _clean(message), "invalid_request_error", code, headers=headers)


def install(app: FastAPI) -> None:
    """Let `app` answer every foreseen exception with the envelope."""
    app.add_exception_handler(PingjiaError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


class LastResort:
    """ASGI middleware: what nobody caught is logged and becomes a 500 with the envelope, inside the request's id."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except ClientDisconnect:  # in the middle of its body
            return
        except Exception as e:
            if scope["type"] != "http" or started:
                raise
            log_if_ours(e, scope["state"].get("request_id", "-"))
            await respond(e)(scope, receive, send)
