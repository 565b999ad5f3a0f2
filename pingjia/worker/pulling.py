"""A backend that works for a queue, in a process of its own: until SIGTERM, then what it has begun is finished."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from pingjia.errors import EngineError
from pingjia.queue.protocol import Queue
from pingjia.queue.puller import Puller
from pingjia.trace import NO_TRACER, Tracer
from pingjia.types import Backend
from pingjia.worker.health import Health

log = logging.getLogger("pingjia.worker")

_LOOK_S = 0.5


def worker_name() -> str:
    """A name no other worker has: where it runs, and a random part, because a restarted one is another one."""
    return f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"


def pull(
    backend: Backend,
    open_queue: Callable[[], Queue],
    *,
    seats: int,
    lease_s: float,
    drain_s: float,
    is_alive: Callable[[], bool] = lambda: True,
    health: Health | None = None,
    tracer: Tracer = NO_TRACER,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Answer what comes through the queue until SIGTERM or SIGINT; returns when drained.

    `open_queue` is called on the event loop that this runs. What is not finished within `drain_s` goes back to the
    queue, and another worker begins it again. `health` is told how it goes. The backend is not stopped: that is up to
    whoever started it.
    Raises EngineError when the backend is not alive any more, so that whoever watches the process starts a new one.
    """
    work = _Work(backend, open_queue, seats, lease_s, drain_s, health or Health(), tracer)
    asyncio.run(_pull(work, is_alive, on_ready))


@dataclass(frozen=True, slots=True)
class _Work:
    backend: Backend
    open_queue: Callable[[], Queue]
    seats: int
    lease_s: float
    drain_s: float
    health: Health
    tracer: Tracer


async def _pull(work: _Work, is_alive: Callable[[], bool], on_ready: Callable[[str], None] | None) -> None:
    queue, stop = work.open_queue(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    puller, health = _puller(work, queue), work.health
    health.loaded(work.backend)
    running = asyncio.create_task(puller.run())
    if on_ready is not None:
        on_ready(puller.name)
    turning = asyncio.create_task(_turn(health, lambda: not stop.is_set() and not puller.is_lost))
    while is_alive() and not running.done() and not await _within(stop, _LOOK_S):
        pass
    log.info("worker %s: finishing what it has begun, for %g s at most", puller.name, work.drain_s)
    try:
        await puller.drain(work.drain_s if is_alive() else 0.0)
        await running
    finally:
        turning.cancel()
        await queue.close()
    if not stop.is_set() and not is_alive():
        raise EngineError("the engine died; its log has the details, start the worker again")


def _puller(work: _Work, queue: Queue) -> Puller:
    return Puller(
        queue,
        work.backend,
        name=worker_name(),
        seats=work.seats,
        beat_s=min(1.0, work.lease_s / 4),
        on_claim=work.health.on_claim,
        on_end=work.health.on_end,
        tracer=work.tracer,
    )


async def _turn(health: Health, is_pulling: Callable[[], bool]) -> None:
    while True:
        health.turned(is_pulling=is_pulling())
        await asyncio.sleep(_LOOK_S)


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Whether it is set before so many seconds are over."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
