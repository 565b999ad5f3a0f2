"""A response that is computed only as long as its client stays: whole as JSON, or streamed as events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pingjia.gateway.answer import Answer
from pingjia.gateway.ask import Ask
from pingjia.gateway.errors import log_if_ours
from pingjia.gateway.responses import Out
from pingjia.gateway.service import Caller, Service
from pingjia.gateway.sse import EventWriter
from pingjia.types import Chunk, Completion, Usage


class WholeShape(Protocol):
    """How an API writes a whole answer."""

    def whole(self, completions: Sequence[Completion], usage: Usage) -> Out: ...


class StreamShape(Protocol):
    """How an API writes an answer piece by piece. None: nothing to send for this."""

    def opening(self, index: int) -> Out | None: ...

    def piece(self, index: int, chunk: Chunk) -> Out | None: ...

    def closing(self, usage: Usage) -> Out | None: ...


def whole_reply(service: Service, ask: Ask, caller: Caller, shape: WholeShape) -> Response:
    """The answer as one JSON document."""

    async def write(send: Send) -> None:
        async with service.answering(ask, caller) as answer:
            body = shape.whole(await answer.completions(), answer.usage).dump()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return _WhileClientStays(write, service.settings.deadline_s)


def stream_reply(service: Service, ask: Ask, caller: Caller, shape: StreamShape) -> Response:
    """The answer as events. An error before the first event is raised; a later one becomes an event."""

    async def write(send: Send) -> None:
        events = EventWriter(send)
        try:
            async with service.answering(ask, caller) as answer:
                await _write_events(events, answer, shape, service.settings.ping_s)
        except Exception as e:
            if not events.started:
                raise
            log_if_ours(e, caller.request_id)
            await events.error(e)
        await events.done()

    return _WhileClientStays(write, service.settings.deadline_s)


async def _write_events(events: EventWriter, answer: Answer, shape: StreamShape, ping_s: float) -> None:
    opened: set[int] = set()
    async for piece in answer.pieces(ping_s):
        if piece is None:
            await events.ping()
            continue
        index, chunk = piece
        if index not in opened:
            opened.add(index)
            await _send(events, shape.opening(index))
        await _send(events, shape.piece(index, chunk))
    await _send(events, shape.closing(answer.usage))


async def _send(events: EventWriter, event: Out | None) -> None:
    if event is not None:
        await events.data(event.dump())


class _WhileClientStays(Response):
    """Runs `write` and listens for the client's departure at the same time; when the client goes, `write` is cancelled.

    Errors before the first byte are raised, so that the app gives them a status.
    """

    def __init__(self, write: Callable[[Send], Awaitable[None]], deadline_s: float) -> None:
        super().__init__()
        self._write = write
        # The answer minds its deadline itself; this one is for a client that stays and does not read.
        self._max_s = deadline_s + 5.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._write(send))
        departure = asyncio.create_task(_departure(receive))
        try:
            await asyncio.wait({work, departure}, return_when=asyncio.FIRST_COMPLETED, timeout=self._max_s)
            if work.done():
                work.result()
        finally:
            work.cancel()
            departure.cancel()
            await asyncio.gather(work, departure, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
