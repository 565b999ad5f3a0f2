"""The result cache: which requests it is for, what a client may say about it, and its answers in place of a backend's.

In front of the roads, so that a kept answer waits for no queue. `cache_key.py` says what an equal question is,
`cache_store.py` where answers lie, `flights.py` that equal questions at one time are computed once.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import cast

from prometheus_client import CollectorRegistry, Counter

from pingjia.gateway.answer import Source
from pingjia.gateway.ask import Ask
from pingjia.gateway.cache_key import Weights, cache_key, is_repeatable, weights_of
from pingjia.gateway.cache_store import MemoryStore, RedisStore, Store
from pingjia.gateway.cached_answer import CachedAnswer, load, reused
from pingjia.gateway.flights import Flight, Flights, Follower
from pingjia.gateway.semantic import Semantics, Topic, topic_of
from pingjia.gateway.settings import GatewaySettings
from pingjia.types import Chunk, ModelCard, Request

log = logging.getLogger("pingjia.gateway")

HEADER = "x-cache"
_MAX_CHECKS = 4  # real answers beside kept ones that are computed at once


Road = Callable[[Sequence[Request]], AbstractAsyncContextManager[Source]]
"""The way of requests that are not answered from here."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What `Cache-Control` says: read: take a kept answer, not older than `max_age_s`; write: keep the new one."""

    read: bool = True
    write: bool = True
    max_age_s: float | None = None

    @classmethod
    def of(cls, header: str) -> Wish:
        """no-cache, no-store and max-age are obeyed; the other directives have no meaning in a request here."""
        parts = {part.strip().lower() for part in header.split(",")}
        ages = [int(match[1]) for part in parts if (match := re.fullmatch(r'max-age="?(\d{1,9})"?', part))]
        age = float(min(ages)) if ages else None
        store = "no-store" not in parts
        return cls(store and "no-cache" not in parts and age != 0, store, age)


@dataclass(frozen=True, slots=True)
class Question:
    """Who asks which model, and what they wish. `headers` of the response get X-Cache and Age."""

    owner: str
    card: ModelCard
    cards: Sequence[ModelCard]
    wish: Wish
    headers: MutableMapping[str, str]
    was_seeded: bool
    """Whether the client itself gave a seed: one that was drawn for it never comes again."""
    ask: Ask | None = None
    """What was asked, where another question may have said the same."""


class ResultCache:
    """Answers kept for those who ask again. One per app; lives on the event loop."""

    def __init__(
        self, settings: GatewaySettings, cards: Callable[[], Sequence[ModelCard]], registry: CollectorRegistry
    ) -> None:
        self._is_on = settings.cache.enabled
        self._store = _store(settings)
        self._max_age_s = settings.cache.max_age_s
        self._cards = cards
        self._flights = Flights()
        self.semantics = Semantics(settings.cache.semantic, registry)
        self._checks: set[asyncio.Task[None]] = set()
        self._purges = 0
        self._counts = Counter("pingjia_cache_requests", "By X-Cache", ["outcome"], registry=registry)
        self._saved = Counter(
            "pingjia_cache_saved_seconds", "Seconds kept answers took when computed", registry=registry
        )

    @asynccontextmanager
    async def open(self, requests: Sequence[Request], question: Question, road: Road) -> AsyncIterator[Source]:
        """The source of these answers. Raises what the road raises, at once or from the stream."""
        weights = self._weights(requests, question)
        if weights is None:
            self._note(question, "BYPASS" if self._is_on else None)
            async with road(requests) as source:
                yield source
            return
        answers = CachedAnswers(self, question, weights, road, self._topic(requests, question, weights))
        try:
            for request in requests:
                await answers.look_up(request)
            if answers.are_shared:
                question.headers.setdefault("age", "0")
            self._note(question, answers.outcome)
            yield answers
        finally:
            await answers.close()

    async def purge(self, owner: str | None) -> int:
        """Forget the answers of an owner, or of everybody; those on their way are not kept either."""
        self._purges += 1
        self.semantics.purge(owner)
        return await self._store.purge(owner)

    async def close(self) -> None:
        for check in self._checks:
            check.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)
        await self.semantics.close()
        await self._store.close()

    def _topic(self, requests: Sequence[Request], question: Question, weights: Weights) -> Topic | None:
        if not self.semantics.has_encoder or question.ask is None:
            return None
        return topic_of(question.ask, requests, weights, question.owner)

    def _weights(self, requests: Sequence[Request], question: Question) -> Weights | None:
        """None: these answers are none of the cache's business."""
        sampling = requests[0].sampling
        drawn = not question.was_seeded and sampling.temperature > 0
        if not self._is_on or not question.wish.write or drawn or not is_repeatable(sampling):
            return None
        return weights_of(question.card, question.cards)

    def _note(self, question: Question, outcome: str | None) -> None:
        if outcome is not None:
            question.headers[HEADER] = outcome
            self._counts.labels(outcome.lower()).inc()

    async def find(self, key: str, question: Question) -> CachedAnswer | None:
        """The kept answer, if it is there, whole, and young enough for this question."""
        data = await self._store.get(question.owner, key)
        try:
            answer = load(data) if data is not None else None
        except ValueError:
            return None
        if answer is None:
            return None
        age_s = max(0.0, time.time() - answer.made_at)
        limit_s = self._max_age_s if question.wish.max_age_s is None else min(self._max_age_s, question.wish.max_age_s)
        if age_s > limit_s:
            return None
        question.headers["age"] = str(int(age_s))
        self._saved.inc(answer.seconds)
        return answer

    def join(self, key: str) -> Follower | None:
        return self._flights.join(key)

    async def find_alike(self, topic: Topic, question: Question) -> CachedAnswer | None:
        """The kept answer to another question that says the same."""
        key = await self.semantics.find(topic)
        answer = await self.find(key, question) if key is not None else None
        if key is not None and answer is None:
            self.semantics.forget(topic)
        return answer

    def check_some(self, request: Request, given: CachedAnswer, key: str, asked: CachedAnswers) -> None:
        """Of a share of the answers that were given to another question, compute the real one and compare."""
        if self.semantics.wants_check and len(self._checks) < _MAX_CHECKS:
            task = asyncio.create_task(self._check(request, given, key, asked))
            self._checks.add(task)
            task.add_done_callback(self._checks.discard)

    async def _check(self, request: Request, given: CachedAnswer, key: str, asked: CachedAnswers) -> None:
        real: list[Chunk] = []
        try:
            follower = self.begin(key, replace(request, id=f"{request.id}-check"), asked.question, asked.road)
            try:
                real = [chunk async for chunk in follower.chunks()]
            finally:
                await follower.leave()
        except Exception as e:
            log.info("a semantic hit could not be checked: %s", e)
            return
        await self.semantics.judge(text_of(given.chunks), text_of(real))

    def begin(self, key: str, request: Request, question: Question, road: Road, topic: Topic | None = None) -> Follower:
        """Compute the answer, for this question and for those that join it; keep it when it is whole."""
        started, purges = time.perf_counter(), self._purges

        async def landed(flight: Flight) -> None:
            seconds = time.perf_counter() - started
            whole = all(c.error is None and c.finish_reason in (None, "stop", "length") for c in flight.answer)
            # If an adapter was replaced meanwhile, nobody can say which of the two has answered.
            if whole and purges == self._purges and self._is_served(question):
                answer = CachedAnswer(tuple(flight.answer), time.time(), round(seconds, 6))
                await self._store.put(question.owner, key, answer.dump())
                if topic is not None:
                    self.semantics.add(topic, question.owner, key)
            self._saved.inc(seconds * (flight.num_joined - 1))

        return self._flights.begin(key, lambda: _travel(request, road), landed, request.sampling.n)

    def _is_served(self, question: Question) -> bool:
        cards = self._cards()
        bases = [card for card in question.cards if card.parent is None]
        return question.card in cards and all(base in cards for base in bases)


@dataclass(slots=True)
class CachedAnswers:
    """The answers to the requests of one question: kept ones, and those on their way."""

    cache: ResultCache
    question: Question
    weights: Weights
    road: Road
    topic: Topic | None = None
    is_alike: bool = False
    _kept: dict[str, CachedAnswer] = field(default_factory=dict)
    _coming: dict[str, Follower] = field(default_factory=dict)

    async def look_up(self, request: Request) -> None:
        """Decide where the answer comes from; from here on it is under way."""
        key = cache_key(request, self.weights, self.question.owner)
        if not self.question.wish.read:
            self._coming[request.id] = self._begin(key, request)
            return
        # A flight ends when its answer is kept: whoever finds neither before nor after has missed nothing.
        follower = self.cache.join(key)
        answer = None if follower is not None else await self.cache.find(key, self.question)
        if answer is None and follower is None and self.topic is not None:
            answer = await self._look_alike(request, key, self.topic)
        if answer is not None:
            self._kept[request.id] = answer
        else:
            self._coming[request.id] = follower or self.cache.join(key) or self._begin(key, request)

    async def _look_alike(self, request: Request, key: str, topic: Topic) -> CachedAnswer | None:
        answer = await self.cache.find_alike(topic, self.question)
        if answer is not None:
            self.is_alike = True
            self.cache.check_some(request, answer, key, self)
        return answer

    @property
    def outcome(self) -> str:
        """What X-Cache says."""
        if not self.are_shared:
            return "MISS"
        return "SEMANTIC" if self.is_alike else "HIT"

    @property
    def are_shared(self) -> bool:
        """Whether none of the answers is computed for this question."""
        return not any(follower.is_owner for follower in self._coming.values())

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        """The answer, once. Leaving it early lets go of it."""
        answer = self._kept.get(request.id)
        if answer is not None:
            for chunk in answer.replay():
                yield chunk
            return
        began, was_owner = False, self._coming[request.id].is_owner
        try:
            async for chunk in self._follow(request):
                began = True
                yield chunk
            return
        except Exception:
            if began or was_owner:
                raise
        # What failed was another's request, perhaps for reasons of its own, such as an early deadline.
        await self._coming[request.id].leave()
        key = cache_key(request, self.weights, self.question.owner)
        self._coming[request.id] = self.cache.join(key) or self._begin(key, request)
        async for chunk in self._follow(request):
            yield chunk

    async def _follow(self, request: Request) -> AsyncIterator[Chunk]:
        follower = self._coming[request.id]
        async for chunk in follower.chunks():
            yield chunk if follower.is_owner else reused(chunk)

    async def close(self) -> None:
        """Let go of what is still on its way."""
        for follower in self._coming.values():
            await follower.leave()

    def _begin(self, key: str, request: Request) -> Follower:
        return self.cache.begin(key, request, self.question, self.road, self.topic)


def text_of(chunks: Sequence[Chunk]) -> str:
    """An answer as text; calls and the like as they were said."""
    return "".join(chunk.foreign or chunk.text for chunk in chunks)


async def _travel(request: Request, road: Road) -> AsyncIterator[Chunk]:
    async with road([request]) as source:
        stream = cast("AsyncGenerator[Chunk, None]", source.stream(request))
        async with aclosing(stream):
            async for chunk in stream:
                yield chunk


def _store(settings: GatewaySettings) -> Store:
    max_bytes, max_age_s = int(settings.cache.max_mb * 1e6), settings.cache.max_age_s
    if settings.redis_url is not None and settings.cache.enabled:
        return RedisStore(settings.redis_url, max_bytes, max_age_s)
    return MemoryStore(max_bytes, max_age_s)
