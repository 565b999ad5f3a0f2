"""How many answers each key has in work: in this process, and over Redis for all gateways together.

Over Redis every answer holds a place with an end (a lease), so that a gateway that dies gives its places back. While
Redis is away each gateway counts by itself: the limit is then per gateway, never absent.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

log = logging.getLogger("pingjia.gateway")

_ANSWER_S = 0.5
_RETRY_S = 2.0
_MAX_TO_FREE = 1000

# KEYS: the places of a key, by their ends. ARGV: seconds a place is held, the limit, then the new places.
_ENTER = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local used = redis.call('ZCARD', KEYS[1])
if used + #ARGV - 2 > tonumber(ARGV[2]) then return used end
for i = 3, #ARGV do redis.call('ZADD', KEYS[1], now + ARGV[1], ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], math.ceil(ARGV[1] * 1000))
return -1
"""


class Places:
    """Places of keys that have a limit. Lives on one event loop. lease_s: the longest an answer may take."""

    def __init__(self, redis_url: str | None, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._here: Counter[str] = Counter()
        self._to_free: dict[str, list[str]] = {}  # given back while Redis was away
        self._lease_s = lease_s
        self._clock = clock
        self._ask_again_at = 0.0
        self._redis: Any = _client(redis_url) if redis_url else None
        self._script = self._redis.register_script(_ENTER) if self._redis is not None else None

    def here(self, name: str) -> int:
        """Places taken in this process."""
        return self._here[name]

    async def enter(self, name: str, num: int, limit: int) -> list[str] | int:
        """Take places; what `leave` needs, or, where they do not fit, how many are taken."""
        if self._here[name] + num > limit:
            return self._here[name]
        places = [secrets.token_hex(8) for _ in range(num)]
        self._here[name] += num
        try:
            used = await self._take(name, places, limit)
        except BaseException:  # the client left just now
            self._drop_here(name, num)
            self._free_later(name, places)
            raise
        if used is not None and int(used) >= 0:
            self._drop_here(name, num)
            return int(used)
        return places

    async def leave(self, name: str, places: list[str]) -> None:
        """Give them back."""
        self._drop_here(name, len(places))
        if self._redis is None:
            return
        if await self._try(lambda: self._redis.zrem(_name(name), *places)) is None:
            self._free_later(name, places)

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.aclose()

    def _drop_here(self, name: str, num: int) -> None:
        self._here[name] -= num
        if not self._here[name]:
            del self._here[name]

    def _free_later(self, name: str, places: list[str]) -> None:
        self._to_free[name] = [*self._to_free.get(name, []), *places][-_MAX_TO_FREE:]

    async def _take(self, name: str, places: list[str], limit: int) -> Any:
        used = await self._try(lambda: self._enter(name, places, limit))
        if used is not None and int(used) >= 0 and name in self._to_free:
            used = await self._try(lambda: self._free_and_enter(name, places, limit))
        return used

    async def _free_and_enter(self, name: str, places: list[str], limit: int) -> Any:
        await self._redis.zrem(_name(name), *self._to_free[name])
        del self._to_free[name]
        return await self._enter(name, places, limit)

    def _enter(self, name: str, places: list[str], limit: int) -> Any:
        assert self._script is not None
        return self._script([_name(name)], [self._lease_s, limit, *places])

    async def _try(self, call: Callable[[], Any]) -> Any:
        """The outcome, or None without Redis and while it is away."""
        if self._redis is None or self._clock() < self._ask_again_at:
            return None
        from redis.exceptions import RedisError

        try:
            async with asyncio.timeout(_ANSWER_S):
                return await call()
        except (RedisError, OSError, TimeoutError) as e:
            self._ask_again_at = self._clock() + _RETRY_S
            log.warning("answers at once: Redis cannot be reached (%s); this gateway counts its own alone", e)
            return None


def _client(url: str) -> Any:
    from redis.asyncio import Redis

    return Redis.from_url(url, socket_timeout=_ANSWER_S, socket_connect_timeout=_ANSWER_S)


def _name(name: str) -> str:
    return f"pingjia:in-work:{name}"
