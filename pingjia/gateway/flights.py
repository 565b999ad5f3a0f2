"""Equal questions that are asked at the same time are computed once, and everybody who waits gets the whole answer.

A flight belongs to nobody: it runs in a task of its own as long as anyone follows it. So when the one who asked first
goes away the others lose nothing, and when the last one goes it ends at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from pingjia.types import Chunk

Start = Callable[[], AsyncIterator[Chunk]]
"""Begins to compute the answer. Closing the iterator ends that."""

Landed = Callable[["Flight"], Awaitable[None]]
"""Hears of a flight whose answer is whole."""


class Flight:
    """One answer on its way. Begins when it is made; `ended` is called once, whatever the end.

    num_choices: how many finish reasons it has. `answer`: what has come. `num_joined`: all who came.
    """

    def __init__(self, start: Start, landed: Landed, ended: Callable[[], None], num_choices: int = 1) -> None:
        self.answer: list[Chunk] = []
        self.num_joined = 0
        self._error: Exception | None = None
        self._is_over = False
        self._num_unfinished = num_choices
        self._news = asyncio.Event()
        self._followers: list[Follower] = []
        self._owner: Follower | None = None  # once the answer is whole
        self._task = asyncio.create_task(self._fly(start, landed))
        self._task.add_done_callback(lambda _: ended())

    def follow(self) -> Follower:
        """Come along: from the first chunk, however late."""
        self.num_joined += 1
        follower = Follower(self)
        self._followers.append(follower)
        return follower

    def owner(self) -> Follower | None:
        """For whom it is computed: who asked first of those who stayed to the end."""
        return self._owner or (self._followers[0] if self._followers else None)

    @property
    def has_failed(self) -> bool:
        return self._is_over and self._num_unfinished > 0

    async def chunks(self) -> AsyncIterator[Chunk]:
        """What has come, then what comes. Raises what the backend raised."""
        i = 0
        while True:
            while i < len(self.answer):
                yield self.answer[i]
                i += 1
            if self._error is not None:
                raise self._error
            if self._is_over:
                return
            await self._news.wait()

    async def leave(self, follower: Follower) -> None:
        """Without followers the flight ends; returns when the backend has let go. A whole answer is still kept."""
        self._followers.remove(follower)
        if not self._followers and self._num_unfinished > 0 and not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _fly(self, start: Start, landed: Landed) -> None:
        try:
            async with aclosing(start()) as stream:  # type: ignore[type-var]
                async for chunk in stream:
                    self._add(chunk)
                    if self._num_unfinished <= 0:
                        break
            if self._num_unfinished <= 0:
                await landed(self)
        except Exception as e:
            self._error = e
        finally:
            self._is_over = True
            self._tell()

    def _add(self, chunk: Chunk) -> None:
        self._num_unfinished -= chunk.finish_reason is not None
        self.answer.append(chunk)
        if self._num_unfinished <= 0 and self._followers:
            self._owner = self._followers[0]
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class Follower:
    """One who waits for a flight. `leave` may be called twice."""

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        self._has_left = False

    @property
    def is_owner(self) -> bool:
        return self._flight.owner() is self

    def chunks(self) -> AsyncIterator[Chunk]:
        return self._flight.chunks()

    async def leave(self) -> None:
        if not self._has_left:
            self._has_left = True
            await self._flight.leave(self)


class Flights:
    """The flights under way, by key."""

    def __init__(self) -> None:
        self._by_key: dict[str, Flight] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def join(self, key: str) -> Follower | None:
        """Follow the flight for `key`, if there is one that has not failed."""
        flight = self._by_key.get(key)
        return flight.follow() if flight is not None and not flight.has_failed else None

    def begin(self, key: str, start: Start, landed: Landed, num_choices: int = 1) -> Follower:
        """Follow a new flight, which from now on is the one for `key`."""
        flight = Flight(start, landed, lambda: self._remove(key, flight), num_choices)
        self._by_key[key] = flight
        return flight.follow()

    def _remove(self, key: str, flight: Flight) -> None:
        if self._by_key.get(key) is flight:
            del self._by_key[key]
