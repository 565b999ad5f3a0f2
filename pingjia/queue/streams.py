"""The queue over Redis 7: Streams with a consumer group, one stream per answer. Every step is one script (`queue.lua`).

What was claimed lies in the stream `work` until its answer has ended, and is claimed again when its worker is not heard
of for the lease. Keys live under one prefix; an ended job's keys expire by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.resources import files
from time import monotonic
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, NoScriptError, ReadOnlyError, TimeoutError

from pingjia.errors import Overloaded, UserError
from pingjia.queue.job import (
    Claim,
    End,
    Job,
    JobStatus,
    Part,
    dump_chunks,
    dump_end,
    dump_job,
    load_chunks,
    load_end,
    load_job,
)
from pingjia.queue.memory import abandoned, expired, pace_of, wish_of
from pingjia.queue.policy import Gate, Limits, Load
from pingjia.queue.protocol import QueueLost, QueueStats, WorkerCard
from pingjia.types import Chunk

log = logging.getLogger("pingjia.queue")

_LOST = (ConnectionError, TimeoutError, BusyLoadingError, ReadOnlyError, OSError)
_RANKS = ("high", "normal", "low")
_BACKOFF_S = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
_GATHER_S = 0.005  # notices that come one upon another are followed together
_SWEEP_S = 1.0  # followers look by themselves this often, should a notice be lost
_MAX_CONNECTIONS = 32
_MAX_EXPECTED = 10_000


class StreamQueue:
    """`protocol.Queue` and `protocol.Records` in Redis. Lives on one event loop.

    patience_s: how long an unreachable server is asked again before QueueLost. Workers' steps and those of answers are
    asked again for the lease: longer would be in vain, because another worker has the job then.
    """

    def __init__(
        self,
        url: str,
        limits: Limits | None = None,
        *,
        prefix: str = "pingjia:",
        patience_s: float = 3.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.limits = limits or Limits()
        self._gate = Gate(self.limits)
        self._prefix = prefix
        self._patience_s = patience_s
        self._clock = clock
        self._redis = _client(url)
        self._vital = _client(url)  # signs of life do not stand in line with what an overload asks
        self._source = files("pingjia.queue").joinpath("queue.lua").read_text(encoding="utf-8")
        self._sha = ""
        self._cards: tuple[WorkerCard, ...] = ()
        self._cards_at = -1e9
        self._followers = _Followers(self._redis, prefix)

    # ---- jobs

    async def submit(self, jobs: Sequence[Job]) -> None:
        known, load = await self._look(jobs)
        fresh = [job for job, there in zip(jobs, known, strict=True) if not there]
        if not fresh:
            return
        self._gate.check(load, wish_of(fresh), self._clock())
        rows = [_row(job) for job in fresh]
        await self._followers.expect([job.id for job in fresh if job.owner])
        limits = {"max_requests": self.limits.max_requests, "max_units": self.limits.max_units}
        if not await self._step("submit", self._patience_s, jobs=rows, **limits):
            raise Overloaded("the queue has just been filled; come back in 1 s", retry_after_s=1.0)

    async def claim(self, worker: str, num: int, wait_s: float) -> list[Claim]:
        claims = await self._claim_now(worker, num)
        if claims or wait_s <= 0:
            return claims
        await self._bell(wait_s)
        return await self._claim_now(worker, num)

    async def beat(self, card: WorkerCard, claims: Sequence[Claim]) -> set[str]:
        held = [{"id": claim.job.id, "delivery": claim.delivery} for claim in claims]
        heard_ms = int(self.limits.heard_s * 1000)
        fields = {"worker": card.name, "card": card.dump(), "claims": held, "heard_ms": heard_ms}
        arguments = json.dumps(fields, separators=(",", ":"))
        lost: list[str] = json.loads(await self._ask(lambda: self._run("beat", arguments, self._vital), 0.0))
        return set(lost)

    async def publish(self, claim: Claim, seq: int, chunks: tuple[Chunk, ...]) -> bool:
        return bool(await self._of("publish", claim, seq=seq, chunks=dump_chunks(chunks)))

    async def end(self, claim: Claim, seq: int, chunks: tuple[Chunk, ...], end: End, spent: int) -> bool:
        fields = {"seq": seq, "chunks": dump_chunks(chunks), "tail": dump_end(end), "kind": end.kind, "spent": spent}
        return bool(await self._of("finish", claim, **fields))

    async def give_back(self, claim: Claim) -> None:
        await self._of("give_back", claim)

    async def leave(self, worker: str) -> None:
        await self._step("leave", 0.0, worker=worker)

    async def cancel(self, job_id: str, message: str) -> bool:
        tail = dump_end(End("cancelled", message))
        return bool(await self._step("cancel", self._patience_s, id=job_id, tail=tail))

    async def follow(self, job_id: str) -> AsyncIterator[Part]:
        if not self._followers.is_expected(job_id) and await self.status(job_id) is None:
            yield Part(0, 0, (), End("abandoned", "this request is not known (any more)", "engine"))
            return
        async with self._followers.of(job_id) as parts:
            while True:
                part = await parts.get()
                yield part
                if part.end is not None:
                    return

    async def status(self, job_id: str) -> JobStatus | None:
        fields = ("state", "tenant", "deaths", "end")
        key = f"{self._prefix}job:{job_id}"
        state, tenant, deaths, end = await self._ask(lambda: self._redis.hmget(key, fields), self._patience_s)
        if state is None:
            return None
        return JobStatus(state, tenant, int(deaths), load_end(end) if end else None)

    async def alive(self, owner: str) -> None:
        self._followers.owners.add(owner)
        key, lease_ms = f"{self._prefix}owner:{owner}", int(self.limits.lease_s * 1000)
        await self._ask(lambda: self._vital.set(key, "1", px=lease_ms), 0.0)

    async def is_heard(self, owner: str) -> bool:
        return bool(await self._ask(lambda: self._redis.exists(f"{self._prefix}owner:{owner}"), 0.0))

    async def stats(self) -> QueueStats:
        waiting, units, claimed, tenants, cards, ended, redelivered, oldest_ms = await self._step("stats", 0.0)
        self._cards = tuple(sorted((WorkerCard.load(text) for text in cards), key=lambda card: card.name))
        self._cards_at = self._clock()
        counts = dict(zip(ended[::2], map(int, ended[1::2]), strict=True)) if ended else {}
        return QueueStats(waiting, units, claimed, tenants, self._cards, counts, redelivered, max(0, oldest_ms) / 1000)

    async def close(self) -> None:
        await self._followers.close()
        await self._redis.aclose()
        await self._vital.aclose()

    # ---- records

    async def save(self, kind: str, record_id: str, text: str, *, tenant: str, keep_s: float) -> None:
        key, value = f"{self._prefix}record:{kind}:{record_id}", json.dumps([tenant, text])
        await self._ask(lambda: self._redis.set(key, value, px=int(keep_s * 1000)), self._patience_s)

    async def add(self, kind: str, record_id: str, text: str, *, tenant: str, keep_s: float) -> str | None:
        key, value = f"{self._prefix}record:{kind}:{record_id}", json.dumps([tenant, text])
        set_it = await self._ask(lambda: self._redis.set(key, value, px=int(keep_s * 1000), nx=True), self._patience_s)
        return None if set_it else await self.load(kind, record_id, tenant=tenant)

    async def remove(self, kind: str, record_id: str) -> None:
        await self._ask(lambda: self._redis.delete(f"{self._prefix}record:{kind}:{record_id}"), self._patience_s)

    async def load(self, kind: str, record_id: str, *, tenant: str) -> str | None:
        key = f"{self._prefix}record:{kind}:{record_id}"
        value = await self._ask(lambda: self._redis.get(key), self._patience_s)
        owner, text = json.loads(value) if value else (None, None)
        return text if owner == tenant else None

    async def post(self, board: str, post_id: str, text: str) -> None:
        await self._ask(lambda: self._redis.hset(f"{self._prefix}board:{board}", post_id, text), self._patience_s)

    async def posted(self, board: str) -> dict[str, str]:
        found: dict[str, str] = await self._ask(lambda: self._redis.hgetall(f"{self._prefix}board:{board}"), 0.0)
        return found

    async def take_down(self, board: str, post_id: str) -> bool:
        key = f"{self._prefix}board:{board}"
        return bool(await self._ask(lambda: self._redis.hdel(key, post_id), self._patience_s))

    # ---- inside

    async def _claim_now(self, worker: str, num: int) -> list[Claim]:
        rows = await self._step(
            "claim",
            None,  # not asked twice: what is handed out with the first answer lost would wait for its lease
            worker=worker,
            num=num,
            lease_ms=int(self.limits.lease_s * 1000),
            max_deliveries=self.limits.max_deliveries,
            expired=dump_end(expired()),
            abandoned=dump_end(abandoned()),
        )
        return [Claim(load_job(body), delivery, left_ms / 1000) for _, delivery, left_ms, body in rows or ()]

    async def _bell(self, wait_s: float) -> None:
        try:
            await self._redis.blpop([f"{self._prefix}bell"], timeout=wait_s)
        except _LOST as e:
            raise _lost(e) from e

    async def _look(self, jobs: Sequence[Job]) -> tuple[list[int], Load]:
        """Which of these are known, and the queue as they find it."""
        num, units, tenant_num, tenant_units, num_tenants, running, known = await self._step(
            "load", self._patience_s, tenant=jobs[0].tenant, rank=jobs[0].rank, ids=[job.id for job in jobs]
        )
        if self._clock() - self._cards_at > 1.0:
            await self.stats()
        seats, units_per_s = pace_of(self._cards)
        rank_units = dict(zip(_RANKS, units, strict=True))
        load = Load(num, rank_units, tenant_num, tenant_units, num_tenants, running, seats, units_per_s)
        return known, load

    async def _of(self, operation: str, claim: Claim, **fields: Any) -> Any:
        return await self._step(operation, self.limits.lease_s, id=claim.job.id, delivery=claim.delivery, **fields)

    async def _step(self, operation: str, patience_s: float | None, **fields: Any) -> Any:
        arguments = json.dumps(fields, separators=(",", ":"))
        reply = await self._ask(lambda: self._run(operation, arguments), patience_s)
        return json.loads(reply) if isinstance(reply, str) else reply

    async def _run(self, operation: str, arguments: str, redis: Redis | None = None) -> Any:
        redis = redis or self._redis
        if not self._sha:
            self._sha = await redis.script_load(self._source)
        try:
            return await redis.evalsha(self._sha, 1, self._prefix, operation, arguments)
        except NoScriptError:  # the server was restarted
            self._sha = await redis.script_load(self._source)
            return await redis.evalsha(self._sha, 1, self._prefix, operation, arguments)

    async def _ask(self, ask: Callable[[], Any], patience_s: float | None) -> Any:
        """Ask, and again after growing pauses; None: once. Everything that is asked so can be asked twice.

        The first time at once, on a new connection: one that lay idle may have ended with a server that is back.
        """
        until = self._clock() + (patience_s or 0.0)
        for attempt in range(1_000_000):
            try:
                return await ask()
            except _LOST as e:
                if attempt == 0 and patience_s is not None and not isinstance(e, TimeoutError):
                    await self._drop_idle()
                    continue
                pause_s = _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)]
                if self._clock() + pause_s > until:
                    raise _lost(e) from e
                await asyncio.sleep(pause_s)

    async def _drop_idle(self) -> None:
        for redis in (self._redis, self._vital):
            with contextlib.suppress(*_LOST):
                await redis.connection_pool.disconnect(inuse_connections=False)


class _Followers:
    """Reads the answers of all who follow one with two connections: news, and the parts that news did not bring.

    News of a gateway's own requests hold the part itself; it is taken if it is the next one, and else read like all
    others. `owners`: the gateways this is; those known before the first follower are listened for.
    """

    def __init__(self, redis: Redis, prefix: str) -> None:
        self.owners: set[str] = set()
        self._redis = redis
        self._prefix = prefix
        self._queues: dict[str, list[asyncio.Queue[Part]]] = {}
        self._read: dict[asyncio.Queue[Part], str] = {}
        self._dirty: set[str] = set()
        self._expected: OrderedDict[str, list[_News]] = OrderedDict()
        self._wake = asyncio.Event()
        self._is_listening = False
        self._tasks: list[asyncio.Task[None]] = []

    async def expect(self, job_ids: Sequence[str]) -> None:
        """These will be submitted and followed: what is heard of them meanwhile is kept."""
        self._start()
        for job_id in job_ids if self._is_listening else ():
            self._expected[job_id] = []
            if len(self._expected) > _MAX_EXPECTED:  # of clients that left in between
                self._expected.popitem(last=False)

    def is_expected(self, job_id: str) -> bool:
        """Whether it was submitted from here, and nothing that was said of it since can have been missed."""
        return job_id in self._expected

    @contextlib.asynccontextmanager
    async def of(self, job_id: str) -> AsyncIterator[asyncio.Queue[Part]]:
        """The parts of one answer, from its first."""
        self._start()
        own: asyncio.Queue[Part] = asyncio.Queue()
        self._queues.setdefault(job_id, []).append(own)
        self._read[own] = "0-0"
        heard = self._expected.pop(job_id, None)
        if heard is None:
            self._mark(job_id)
        for news in heard or ():
            self._take(job_id, news)
        try:
            yield own
        finally:
            del self._read[own]
            self._queues[job_id].remove(own)
            if not self._queues[job_id]:
                del self._queues[job_id]

    def _start(self) -> None:
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._read_always())]

    async def close(self) -> None:
        """End both tasks. Once is not enough: the client takes a cancellation while it connects for a lost server."""
        tasks, self._tasks = self._tasks, []
        while tasks:
            for task in tasks:
                task.cancel()
            _, left = await asyncio.wait(tasks, timeout=0.1)
            tasks = list(left)

    def _mark(self, *job_ids: str) -> None:
        self._dirty.update(job_ids)
        self._wake.set()

    async def _listen(self) -> None:
        channels = [f"{self._prefix}news", *(f"{self._prefix}news:{owner}" for owner in sorted(self.owners))]
        while True:
            try:
                async with self._redis.pubsub() as notices:
                    await notices.subscribe(*channels)
                    async for notice in notices.listen():
                        if notice["type"] == "message":
                            self._hear(notice["data"])
                        elif notice["channel"] == channels[-1]:
                            self._mark(*self._queues)  # what came before we listened
                            self._is_listening = True
            except _LOST:
                self._is_listening = False
                self._expected.clear()
                await asyncio.sleep(_BACKOFF_S[2])

    def _hear(self, text: str) -> None:
        """The id of a request; or that, the number of a part, and the part."""
        job_id, news = (text, None) if text[:1] != "[" else _news_of(text)
        if job_id in self._queues:
            self._take(job_id, news)
        elif job_id in self._expected:
            self._expected[job_id].append(news)

    def _take(self, job_id: str, news: _News) -> None:
        for own in self._queues[job_id]:
            if news is not None and _is_next(self._read[own], news[0]):
                self._read[own] = news[0]
                own.put_nowait(news[1])
            else:
                self._mark(job_id)

    async def _read_always(self) -> None:
        read_at = -1e9
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _SWEEP_S)
            await asyncio.sleep(max(0.0, read_at + _GATHER_S - monotonic()))
            self._wake.clear()
            read_at = monotonic()
            dirty = self._dirty or set(self._queues)
            self._dirty = set()
            try:
                await self._fetch([job_id for job_id in dirty if job_id in self._queues])
            except _LOST:
                self._dirty |= dirty
                await asyncio.sleep(_BACKOFF_S[2])
            except Exception:
                log.exception("answers could not be read")
                await asyncio.sleep(_BACKOFF_S[3])

    async def _fetch(self, job_ids: Sequence[str]) -> None:
        """One round trip for all of them; a follower that came later reads from its own place."""
        followers = [(job_id, own) for job_id in job_ids for own in self._queues[job_id]]
        if not followers:
            return
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id, own in followers:
                pipe.xrange(f"{self._prefix}answer:{job_id}", min=f"({self._read[own]}")
            replies = await pipe.execute()
        for (_, own), entries in zip(followers, replies, strict=True):
            for number, fields in entries:
                if own in self._read and _order(number) > _order(self._read[own]):
                    self._read[own] = number
                    own.put_nowait(_part(number, fields))


def _part(number: str, fields: dict[str, str]) -> Part:
    delivery, _, seq = number.partition("-")
    chunks = load_chunks(fields["chunks"]) if "chunks" in fields else ()
    return Part(int(delivery), int(seq), chunks, load_end(fields["end"]) if "end" in fields else None)


_News = tuple[str, Part] | None
"""The number of a part in its answer, and the part; None: something is to be read."""


def _news_of(text: str) -> tuple[str, _News]:
    job_id, number, chunks, end = json.loads(text)
    fields = {name: value for name, value in (("chunks", chunks), ("end", end)) if value is not None}
    return job_id, (number, _part(number, fields))


def _order(number: str) -> tuple[int, int]:
    delivery, _, seq = number.partition("-")
    return int(delivery), int(seq)


def _is_next(read: str, number: str) -> bool:
    """Whether nothing can lie between these two. Also the first part is known by its number."""
    delivery, seq = _order(number)
    return (delivery, seq) == (1, 1) if read == "0-0" else (delivery, seq - 1) == _order(read)


def _row(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "tenant": job.tenant,
        "rank": job.rank,
        "cost": job.cost,
        "deadline_ms": int(job.deadline_s * 1000),
        "keep_ms": int(job.keep_s * 1000),
        "owner": job.owner,
        "body": dump_job(job),
    }


def _lost(error: Exception) -> QueueLost:
    return QueueLost(f"the queue's Redis server cannot be reached ({type(error).__name__}); try again in a moment")


def _client(url: str) -> Redis:
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            decode_responses=True,
            socket_connect_timeout=2.0,
            socket_timeout=10.0,
            max_connections=_MAX_CONNECTIONS,
            timeout=10.0,  # for a free connection
            retry=Retry(NoBackoff(), 0),  # what may be asked again is known here, not there
        )
        return Redis.from_pool(pool)
    except ValueError as e:
        raise UserError(f"redis_url: {e}; write redis://host:port/number") from None
