"""ASGI middleware: header fields that were found out on the way, on the response whatever became of it."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class ResponseHeaders:
    """Adds what endpoints put into scope["state"]["headers"]: limits, cache, language."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = scope["state"].get("headers", {})
                fields = [(name.encode(), value.encode()) for name, value in found.items()]
                message["headers"] = [*message.get("headers", ()), *fields]
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)
