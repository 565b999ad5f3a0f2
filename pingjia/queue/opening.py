"""Which queue a setting means."""

from __future__ import annotations

from typing import Protocol

from pingjia.errors import UserError
from pingjia.queue.memory import MemoryQueue
from pingjia.queue.policy import Limits
from pingjia.queue.protocol import Queue, Records

_OLDEST = 7


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


def check_redis(url: str) -> None:
    """Return if a Redis server that can hold the queue answers there. Raises UserError saying what is wrong."""
    from redis import Redis
    from redis.exceptions import RedisError

    try:
        with Redis.from_url(url, socket_connect_timeout=3.0, socket_timeout=3.0) as client:
            version = str(client.info("server")["redis_version"])
    except ValueError as e:
        raise UserError(f"redis_url: {e}; write redis://host:port/number") from None
    except RedisError as e:
        raise UserError(f"redis_url: no Redis server answers ({e}); start one, or give another URL") from None
    if int(version.split(".")[0]) < _OLDEST:
        raise UserError(f"the Redis server is version {version}; the queue needs {_OLDEST}.0 or newer")
