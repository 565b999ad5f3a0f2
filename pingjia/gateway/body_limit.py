"""ASGI middleware: a request body has a size and a time, also when it comes in pieces without a declared length.

The whole body is read here, before anything else costs time; the application gets it in one piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pingjia.gateway.errors import BodyTooLarge, BodyTooSlow, respond


class BodyLimit:
    """413 over `max_bytes`, 408 over `max_s`. `streamed`: path -> its own limit in bytes.

    Bodies of those paths are not held here; too much, or a pause of `max_s`, is an error while they are read.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_s: float, streamed: Mapping[str, int] | None = None) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_s = max_s
        self.streamed = streamed or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] in self.streamed:
            await self.app(scope, self._counted(receive, self.streamed[scope["path"]]), send)
            return
        try:
            self._check(_declared(scope["headers"]))
            body = await self._read(receive)
        except (BodyTooLarge, BodyTooSlow) as e:
            await respond(e)(scope, receive, send)
        except ClientDisconnect:
            return
        else:
            await self.app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self.max_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    body += message.get("body", b"")
                    self._check(len(body))
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            message_text = f"the body was not complete after {self.max_s:g} s ({len(body)} bytes came); send it faster"
            raise BodyTooSlow(message_text) from None

    def _counted(self, receive: Receive, max_bytes: int) -> Receive:
        num_bytes, is_over = 0, False

        async def counted() -> Message:
            nonlocal num_bytes, is_over
            if is_over:
                return await receive()
            try:
                async with asyncio.timeout(self.max_s):
                    message = await receive()
            except TimeoutError:
                raise BodyTooSlow(
                    f"nothing came for {self.max_s:g} s after {num_bytes} bytes; send it faster"
                ) from None
            num_bytes += len(message.get("body", b""))
            is_over = not message.get("more_body", False)
            if num_bytes > max_bytes:
                raise BodyTooLarge(f"the body has {num_bytes} bytes or more; this server takes {max_bytes} here")
            return message

        return counted

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise BodyTooLarge(f"the body has {num_bytes} bytes or more; this server takes {self.max_bytes}")


def _declared(headers: Iterable[tuple[bytes, bytes]]) -> int:
    value = next((value for name, value in headers if name == b"content-length"), b"")
    return int(value) if value.isdigit() else 0


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()  # only a disconnect can come now, and whoever waits for it must see it
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
