"""Server-sent events over ASGI: the headers, one `data:` line per event, a comment as a sign of life, `[DONE]`."""

from __future__ import annotations

import json

from starlette.types import Send

from pingjia.gateway.errors import describe

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events otherwise
]


class EventWriter:
    """Writes one event stream. The headers go out with the first event, so that until then a status can be chosen."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def data(self, json_text: bytes) -> None:
        """One event. `json_text` must be on one line."""
        await self._write(b"data: " + json_text + b"\n\n")

    async def ping(self) -> None:
        """A comment, which clients skip and proxies count as traffic."""
        await self._write(b": ping\n\n")

    async def error(self, exc: BaseException) -> None:
        """The error envelope as an event: the status is out already."""
        await self.data(json.dumps(describe(exc).envelope(), ensure_ascii=False).encode())

    async def done(self) -> None:
        """The end of the stream."""
        await self._write(b"data: [DONE]\n\n", last=True)

    async def _write(self, data: bytes, *, last: bool = False) -> None:
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
