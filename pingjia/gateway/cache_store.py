"""Where kept answers lie, bounded in size and age: in this process, or in Redis for several gateways.

A store that fails costs a hit, never an answer. Owners are kept apart by the key already (`cache_key.py`); here they
are named once more, so that one of them can be emptied.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from cachetools import TTLCache

log = logging.getLogger("pingjia.gateway")

_OVERHEAD = 400  # bytes of a kept answer's key and place
_ANSWER_S = 0.25
_RETRY_S = 2.0
_MAX_SHARE = 8  # an answer larger than this part of the store would push out too much


class Store(Protocol):
    """Bytes by owner and key."""

    async def get(self, owner: str, key: str) -> bytes | None: ...

    async def put(self, owner: str, key: str, data: bytes) -> None: ...

    async def purge(self, owner: str | None) -> int:
        """Remove everything of an owner, or of all; return how much that was."""
        ...

    async def close(self) -> None: ...


class MemoryStore:
    """In this process; the least recently used go first."""

    def __init__(self, max_bytes: int, max_age_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._kept: TTLCache[tuple[str, str], bytes] = TTLCache(max_bytes, max_age_s, clock, _size)

    async def get(self, owner: str, key: str) -> bytes | None:
        return self._kept.get((owner, key))

    async def put(self, owner: str, key: str, data: bytes) -> None:
        if _size(data) <= self._max_bytes // _MAX_SHARE:
            self._kept[owner, key] = data

    async def purge(self, owner: str | None) -> int:
        doomed = [place for place in list(self._kept) if owner in (None, place[0])]
        for place in doomed:
            self._kept.pop(place, None)
        return len(doomed)

    async def close(self) -> None:
        self._kept.clear()

    @property
    def num_bytes(self) -> int:
        return int(self._kept.currsize)


def _size(data: bytes) -> int:
    return len(data) + _OVERHEAD


# Answers have names of their own and an end; beside them lie an order of use and the sizes, from which room is made.
_PUT = """
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local old = tonumber(redis.call('HGET', KEYS[3], KEYS[1]) or '0')
redis.call('HSET', KEYS[3], KEYS[1], ARGV[3])
redis.call('ZADD', KEYS[2], ARGV[4], KEYS[1])
local total = redis.call('INCRBY', KEYS[4], ARGV[3] - old)
while total > tonumber(ARGV[5]) do
  local oldest = redis.call('ZPOPMIN', KEYS[2])
  if #oldest == 0 then redis.call('SET', KEYS[4], 0) break end
  redis.call('DEL', oldest[1])
  total = redis.call('DECRBY', KEYS[4], redis.call('HGET', KEYS[3], oldest[1]) or 0)
  redis.call('HDEL', KEYS[3], oldest[1])
end
return total
"""
_GET = """
local data = redis.call('GET', KEYS[1])
if data then
  redis.call('ZADD', KEYS[2], ARGV[1], KEYS[1])
elseif redis.call('ZREM', KEYS[2], KEYS[1]) == 1 then
  redis.call('DECRBY', KEYS[4], redis.call('HGET', KEYS[3], KEYS[1]) or 0)
  redis.call('HDEL', KEYS[3], KEYS[1])
end
return data
"""
_DROP = """
local gone = 0
for _, key in ipairs(ARGV) do
  gone = gone + redis.call('DEL', key)
  if redis.call('ZREM', KEYS[1], key) == 1 then
    redis.call('DECRBY', KEYS[3], redis.call('HGET', KEYS[2], key) or 0)
    redis.call('HDEL', KEYS[2], key)
  end
end
return gone
"""
_PREFIX = "pingjia:cache"


class RedisStore:
    """In Redis: the same bounds, held there, for all gateways together. Answers lie there in clear."""

    def __init__(self, url: str, max_bytes: int, max_age_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        from redis.asyncio import Redis

        self._redis: Any = Redis.from_url(url, socket_timeout=_ANSWER_S, socket_connect_timeout=_ANSWER_S)
        self._max_bytes = max_bytes
        self._max_age_ms = max(1, int(max_age_s * 1000))
        self._clock = clock
        self._ask_again_at = 0.0
        self._put, self._get, self._drop = map(self._redis.register_script, (_PUT, _GET, _DROP))
        self._books = [f"{_PREFIX}:{book}" for book in ("order", "sizes", "bytes")]

    async def get(self, owner: str, key: str) -> bytes | None:
        return await self._try(lambda: self._get([_name(owner, key), *self._books], [str(time.time())]))

    async def put(self, owner: str, key: str, data: bytes) -> None:
        if _size(data) <= self._max_bytes // _MAX_SHARE:
            values: list[Any] = [data, self._max_age_ms, _size(data), time.time(), self._max_bytes]
            await self._try(lambda: self._put([_name(owner, key), *self._books], values))

    async def purge(self, owner: str | None) -> int:
        """Unlike the others it fails when Redis does: whoever empties a cache must know whether it is empty."""
        pattern = f"{_PREFIX}:answer:{'*' if owner is None else _owner(owner)}:*"
        num = 0
        async for keys in _batches(self._redis.scan_iter(match=pattern, count=1000)):
            num += int(await self._drop(self._books, keys))
        return num

    async def close(self) -> None:
        await self._redis.aclose()

    async def _try(self, call: Callable[[], Any]) -> Any:
        from redis.exceptions import RedisError

        if self._clock() < self._ask_again_at:
            return None
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await call()
        except (RedisError, OSError, TimeoutError) as e:
            self._ask_again_at = self._clock() + _RETRY_S
            why = str(e) or f"no answer within {_ANSWER_S} s"
            log.warning("cache: Redis cannot be reached (%s); answers are computed meanwhile", why)
            return None


def _owner(owner: str) -> str:
    return hashlib.sha256(owner.encode()).hexdigest()[:32]


def _name(owner: str, key: str) -> str:
    return f"{_PREFIX}:answer:{_owner(owner)}:{key}"


async def _batches(keys: Any, num: int = 500) -> Any:
    batch: list[bytes] = []
    async for key in keys:
        batch.append(key)
        if len(batch) == num:
            yield batch
            batch = []
    if batch:
        yield batch
