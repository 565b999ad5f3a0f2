"""ASGI middleware: the span of a whole request, child of the caller's where its `traceparent` says so.

Health and metrics have none. What the access log knows of an answer becomes attributes; contents never do.
"""

from __future__ import annotations

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pingjia.trace import NO_SPAN, Span, Tracer

_QUIET = ("/health", "/metrics")
_OF_ACCOUNT = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish_reason": "gen_ai.response.finish_reasons",
    "ttft": "gen_ai.response.time_to_first_chunk",
    "cache": "pingjia.cache",
    "refused": "pingjia.refused",
}


class Traces:
    """Puts the span into scope["state"]["span"], and its name into the response's `traceparent`."""

    def __init__(self, app: ASGIApp, *, tracer: Tracer) -> None:
        self.app = app
        self.tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.tracer.is_on or scope["path"].startswith(_QUIET):
            await self.app(scope, receive, send)
            return
        reply = NO_SPAN
        with self.tracer.span(scope["method"], _carrier(scope), kind="server") as span:
            scope.setdefault("state", {})["span"] = span

            async def watch(message: Message) -> None:
                nonlocal reply
                if message["type"] == "http.response.start":
                    reply = span.child("reply")
                    _tell_status(span, message["status"])
                    parent = span.carrier.partition(" ")[0].encode()
                    message["headers"] = [*message.get("headers", ()), (b"traceparent", parent)]
                await send(message)

            try:
                await self.app(scope, receive, watch)
            finally:
                reply.end()
                _describe(span, scope)


def _carrier(scope: Scope) -> str:
    given = dict(scope["headers"])
    parent, state = (given.get(name, b"").decode("latin-1") for name in (b"traceparent", b"tracestate"))
    return f"{parent} {state}".strip() if parent else ""


def _tell_status(span: Span, status: int) -> None:
    span.set(http__response__status_code=status)
    if status >= 500:
        span.fail(str(status))


def _describe(span: Span, scope: Scope) -> None:
    route = getattr(scope.get("route"), "path", "")  # low in number, unlike paths
    span.rename(f"{scope['method']} {route}".strip())
    account: dict[str, Any] = scope["state"].get("account", {})
    known = {attribute: account.get(name) for name, attribute in _OF_ACCOUNT.items()}
    span.set(**{"http.request.method": scope["method"], "http.route": route or None, **known})
    span.set(**{"pingjia.request_id": scope["state"].get("request_id"), "pingjia.key": scope["state"].get("key_id")})
