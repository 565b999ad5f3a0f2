"""Which queue a setting means."""

from __future__ import annotations

from typing import Protocol

from pingjia.queue.memory import MemoryQueue
from pingjia.queue.policy import Limits
from pingjia.queue.protocol import Queue, Records


class Shelf(Queue, Records, Protocol):
    """A queue that also keeps records."""


def open_queue(redis_url: str | None, limits: Limits | None = None, *, prefix: str = "pingjia:") -> Shelf:
    """The queue in this process, or that of a Redis server. Connects with its first use.

    Raises UserError for a URL that is none, ModuleNotFoundError without the extra `redis`.
    """
    if redis_url is None:
        return MemoryQueue(limits)
    from pingjia.queue.streams import StreamQueue

    return StreamQueue(redis_url, limits, prefix=prefix)
