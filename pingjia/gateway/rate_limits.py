"""Limits per minute, by the library `limits`: a sliding window of two counters, in this process or shared over Redis.

When Redis cannot be reached, this process goes on by itself with `local_share` of each limit: never without a limit,
never at a standstill. Redis is asked again every RETRY_S, by one request at a time. Not here: who has which limit
(`guard.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import floor, inf

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError

log = logging.getLogger("pingjia.gateway")

WINDOW_S = 60
RETRY_S = 2.0
_NO_LIMIT = 2**40
_ANSWER_S = 0.5  # Redis answers within a millisecond or is in trouble

_Storage = MemoryStorage | RedisStorage


@dataclass(frozen=True, slots=True)
class Window:
    """What was counted: in the minute before, of which `previous_left_s` still weigh, and in the current one.

    `current_left_s`: until the current minute is the one before.
    """

    previous: int = 0
    previous_left_s: float = 0.0
    current: int = 0
    current_left_s: float = WINDOW_S

    @property
    def used(self) -> float:
        return self.previous * self.previous_left_s / WINDOW_S + self.current

    @property
    def empty_in_s(self) -> float:
        """Seconds until nothing weighs any more, if nothing comes."""
        if self.current > 0:
            return self.current_left_s + WINDOW_S
        return self.previous_left_s if self.previous > 0 else 0.0

    def wait_s(self, limit: int, cost: int) -> float:
        """Seconds until `cost` fits under `limit`, if nothing else comes; infinite when it never does."""
        if cost > limit:
            return inf
        room = limit - cost
        if floor(self.used) <= room:
            return 0.0
        if self.current <= room:  # the minute before has to fade until floor(its weight) fits
            return self.previous_left_s - _left_s_for(self.previous, room + 1 - self.current)
        return self.current_left_s + WINDOW_S - _left_s_for(self.current, room + 1)


def _left_s_for(count: int, weight: int) -> float:
    """The part of a minute at which `count` weighs just under `weight`."""
    return max(0.0, WINDOW_S * weight / count - 1e-3)


@dataclass(frozen=True, slots=True)
class Taken:
    """The outcome of asking for room. `limit` is the one in force, which is smaller while Redis is lost."""

    ok: bool
    limit: int
    window: Window
    cost: int

    @property
    def remaining(self) -> int:
        return max(0, self.limit - floor(self.window.used))

    @property
    def wait_s(self) -> float:
        return self.window.wait_s(self.limit, self.cost)


class RateLimits:
    """Counts per name and minute. Lives on one event loop. `clock` is monotonic."""

    def __init__(self, redis_url: str | None, *, local_share: float, clock: Callable[[], float]) -> None:
        self._local = MemoryStorage()
        self._shared = _redis(redis_url) if redis_url else None
        self._local_share = local_share
        self._clock = clock
        self._ask_again_at = 0.0
        self.is_lost = False

    async def take(self, name: str, limit: int, cost: int) -> Taken:
        """Count `cost` under `name` if it fits."""
        if self._shared is not None and self._clock() >= self._ask_again_at:
            self._ask_again_at = self._clock() + RETRY_S if self.is_lost else 0.0  # the others do not wait for the try
            try:
                async with asyncio.timeout(_ANSWER_S):
                    taken = await _take(self._shared, name, limit, cost)
                self._found()
                return taken
            except (StorageError, OSError, TimeoutError) as e:
                self._lose(e)
        if self._shared is not None:
            limit = max(1, floor(limit * self._local_share))
        return await _take(self._local, name, limit, cost)

    async def give_back(self, name: str, num: int) -> None:
        """Take `num` off the count again, as far as the current minute holds that much."""
        storage = self._local if self._shared is None or self.is_lost else self._shared
        try:
            async with asyncio.timeout(_ANSWER_S):
                await _give_back(storage, name, num)
        except (StorageError, OSError, TimeoutError) as e:
            self._lose(e)

    async def close(self) -> None:
        """Let go of Redis."""
        if self._shared is not None:
            await self._shared.bridge.get_connection().aclose()  # type: ignore[attr-defined]

    def _lose(self, error: Exception) -> None:
        self._ask_again_at = self._clock() + RETRY_S
        if not self.is_lost:
            share = f"{self._local_share:.0%}"
            log.warning("limits: Redis cannot be reached (%s); this process allows %s of them alone", error, share)
        self.is_lost = True

    def _found(self) -> None:
        self._ask_again_at = 0.0
        if self.is_lost:
            log.warning("limits: Redis is back; limits are shared again")
        self.is_lost = False


def _redis(url: str) -> RedisStorage:
    return RedisStorage(
        f"async+{url}",
        wrap_exceptions=True,
        implementation="redispy",
        key_prefix="pingjia:limits",
        socket_timeout=_ANSWER_S,
        socket_connect_timeout=_ANSWER_S,
    )


async def _take(storage: _Storage, name: str, limit: int, cost: int) -> Taken:
    item = _item(limit)
    ok = await SlidingWindowCounterRateLimiter(storage).hit(item, name, cost=cost)
    return Taken(ok, limit, await _window(storage, item.key_for(name)), cost)


async def _give_back(storage: _Storage, name: str, num: int) -> None:
    item = _item(_NO_LIMIT)
    window = await _window(storage, item.key_for(name))
    num = min(num, window.current)
    if num > 0:
        # A hit of negative cost: the library has no other word for it.
        await SlidingWindowCounterRateLimiter(storage).hit(item, name, cost=-num)


async def _window(storage: _Storage, key: str) -> Window:
    previous, previous_s, current, current_s = await storage.get_sliding_window(key, WINDOW_S)
    left_s = current_s - WINDOW_S if current_s > 0 else float(WINDOW_S)
    return Window(max(0, previous), max(0.0, previous_s), max(0, current), max(0.0, left_s))


def _item(limit: int) -> RateLimitItemPerMinute:
    # One key for a name whatever its limit is, so that a changed limit goes on from what was counted.
    return _AnyLimit(limit, namespace="pingjia")


class _AnyLimit(RateLimitItemPerMinute):
    def key_for(self, *identifiers: bytes | str | int | float) -> str:
        return ":".join(map(str, identifiers))
