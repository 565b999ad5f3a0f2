"""A backend that works for a queue, in a process of its own: until SIGTERM, then what it has begun is finished."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import uuid
from collections.abc import Callable

from pingjia.queue.protocol import Queue
from pingjia.queue.puller import Puller
from pingjia.types import Backend

log = logging.getLogger("pingjia.worker")


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
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Answer what comes through the queue until SIGTERM or SIGINT; returns when drained.

    `open_queue` is called on the event loop that this runs. What is not finished within `drain_s` goes back to the
    queue, and another worker begins it again. The backend is not stopped: that is up to whoever started it.
    """
    asyncio.run(_pull(backend, open_queue, seats, lease_s, drain_s, on_ready))


async def _pull(
    backend: Backend,
    open_queue: Callable[[], Queue],
    seats: int,
    lease_s: float,
    drain_s: float,
    on_ready: Callable[[str], None] | None,
) -> None:
    queue, stop = open_queue(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    puller = Puller(queue, backend, name=worker_name(), seats=seats, beat_s=min(1.0, lease_s / 4))
    running = asyncio.create_task(puller.run())
    stopping = asyncio.create_task(stop.wait())
    if on_ready is not None:
        on_ready(puller.name)
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    log.info("worker %s: finishing what it has begun, for %g s at most", puller.name, drain_s)
    try:
        await puller.drain(drain_s)
        await running
    finally:
        await queue.close()
