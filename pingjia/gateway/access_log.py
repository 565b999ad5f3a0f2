"""ASGI middleware: one JSON line per request. Never a prompt, an answer, a query string or a key."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pingjia.gateway.errors import CLIENT_CLOSED

log = logging.getLogger("pingjia.access")


class AccessLog:
    """Writes the line when the response is over; `on_status(status)` also hears of it (for the metrics).

    What endpoints put into scope["state"]["account"] is added: model, tokens, finish_reason, ttft_s.
    """

    def __init__(self, app: ASGIApp, *, clock: Callable[[], float], on_status: Callable[[int], None]) -> None:
        self.app = app
        self.clock = clock
        self.on_status = on_status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = self.clock(), CLIENT_CLOSED

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            self.on_status(status)
            if not (scope["path"].startswith("/health") and status < 400):
                log.info("%s", json.dumps(_line(scope, status, self.clock() - started)))


def _line(scope: Scope, status: int, seconds: float) -> dict[str, Any]:
    state = scope["state"]
    client = scope.get("client")
    line = {
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": state.get("request_id"),
        "client": client[0] if client else None,
        "key": state.get("key_id"),
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "seconds": round(seconds, 4),
        **state.get("account", {}),
    }
    return {name: value for name, value in line.items() if value is not None}
