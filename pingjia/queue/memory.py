"""The queue inside one process. Lives on one event loop; what waits is lost with the process."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from pingjia.queue.job import Claim, End, Job, JobState, JobStatus, Part, Rank
from pingjia.queue.policy import WEIGHTS, FairShare, Gate, Limits, Load, Wish
from pingjia.queue.protocol import QueueStats, WorkerCard
from pingjia.types import Chunk, Request

_NONE_KNOWN = End("abandoned", "this request is not known (any more)", "engine")


@dataclass(slots=True)
class _Entry:
    job: Job
    number: int  # of its arrival: its place among its tenant's
    submitted: float
    deadline: float
    state: JobState = "waiting"
    delivery: int = 0
    deaths: int = 0
    worker: str = ""
    lease: float = 0.0
    parts: list[Part] = field(default_factory=list)
    end: End | None = None
    forget_at: float = 0.0
    news: asyncio.Event = field(default_factory=asyncio.Event)


class _Waiting:
    """What waits, by rank and tenant, and whose turn it is."""

    def __init__(self) -> None:
        self.ranks = FairShare(WEIGHTS)
        self.tenants = {rank: FairShare() for rank in WEIGHTS}
        self.lines: dict[tuple[str, str], dict[int, _Entry]] = {}
        self.num = 0
        self.units: Counter[str] = Counter()

    def add(self, entry: _Entry) -> None:
        rank, tenant = entry.job.rank, entry.job.tenant
        line = self.lines.setdefault((rank, tenant), {})
        line[entry.number] = entry
        self.ranks.join(rank)
        self.tenants[rank].join(tenant)
        self.num += 1
        self.units[rank] += entry.job.cost

    def remove(self, entry: _Entry) -> None:
        rank, tenant = entry.job.rank, entry.job.tenant
        line = self.lines[rank, tenant]
        del line[entry.number]
        self.num -= 1
        self.units[rank] -= entry.job.cost
        if not line:
            del self.lines[rank, tenant]
            self.tenants[rank].leave(tenant)
            if self.tenants[rank].num_waiting == 0:
                self.ranks.leave(rank)

    def next(self) -> _Entry | None:
        rank = self.ranks.next()
        tenant = None if rank is None else self.tenants[rank].next()
        if rank is None or tenant is None:
            return None
        line = self.lines[rank, tenant]
        return line[min(line)] if len(line) > 1 else next(iter(line.values()))

    def charge(self, job: Job, units: float) -> None:
        self.ranks.charge(job.rank, units)
        self.tenants[job.rank].charge(job.tenant, units)


class MemoryQueue:
    """`protocol.Queue` and `protocol.Records` in this process. `clock` counts seconds."""

    def __init__(self, limits: Limits | None = None, clock: Callable[[], float] = monotonic) -> None:
        self.limits = limits or Limits()
        self._gate = Gate(self.limits)
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._ended: OrderedDict[str, _Entry] = OrderedDict()
        self._waiting = _Waiting()
        self._claimed: dict[str, _Entry] = {}
        self._cards: dict[str, tuple[WorkerCard, float]] = {}
        self._owners: dict[str, float] = {}
        self._bell = asyncio.Event()
        self._number = 0
        self._counts: Counter[str] = Counter()
        self._num_redelivered = 0
        self._boards: dict[str, dict[str, str]] = {}
        self._records: dict[tuple[str, str], tuple[str, str, float]] = {}

    # ---- jobs

    async def submit(self, jobs: Sequence[Job]) -> None:
        now = self._clock()
        self._forget(now)
        fresh = [job for job in jobs if job.id not in self._entries]
        if not fresh:
            return
        wish = wish_of(fresh)
        self._gate.check(self._load(wish.tenant, wish.rank, now), wish, now)
        for job in fresh:
            self._number += 1
            entry = self._entries[job.id] = _Entry(job, self._number, now, now + job.deadline_s)
            self._waiting.add(entry)
        self._bell.set()

    async def claim(self, worker: str, num: int, wait_s: float) -> list[Claim]:
        claims = self._claim_now(worker, num)
        if claims or wait_s <= 0:
            return claims
        self._bell.clear()
        try:
            async with asyncio.timeout(min(wait_s, self._until_lease())):
                await self._bell.wait()
        except TimeoutError:
            pass
        return self._claim_now(worker, num)

    async def beat(self, card: WorkerCard, claims: Sequence[Claim]) -> set[str]:
        now = self._clock()
        self._cards[card.name] = (card, now)
        lost = set()
        for claim in claims:
            entry = self._held(claim)
            if entry is None:
                lost.add(claim.job.id)
            else:
                entry.lease = now + self.limits.lease_s
        return lost

    async def publish(self, claim: Claim, seq: int, chunks: tuple[Chunk, ...]) -> bool:
        entry = self._held(claim)
        if entry is None:
            return False
        self._append(entry, Part(claim.delivery, seq, chunks))
        return True

    async def end(self, claim: Claim, seq: int, chunks: tuple[Chunk, ...], end: End, spent: int) -> bool:
        entry = self._held(claim)
        if entry is None:
            return False
        self._waiting.charge(entry.job, spent - entry.job.cost)
        self._finish(entry, end, seq, chunks)
        return True

    async def give_back(self, claim: Claim) -> None:
        entry = self._held(claim)
        if entry is not None:
            self._waiting.charge(entry.job, -entry.job.cost)
            self._wait_again(entry)

    async def leave(self, worker: str) -> None:
        self._cards.pop(worker, None)

    async def cancel(self, job_id: str, message: str) -> bool:
        entry = self._entries.get(job_id)
        if entry is None or entry.state == "ended":
            return False
        self._finish(entry, End("cancelled", message))
        return True

    async def follow(self, job_id: str) -> AsyncIterator[Part]:
        entry = self._entries.get(job_id)
        if entry is None:
            yield Part(0, 0, (), _NONE_KNOWN)
            return
        num_read = 0
        while True:
            while num_read < len(entry.parts):
                num_read += 1
                yield entry.parts[num_read - 1]
                if entry.parts[num_read - 1].end is not None:
                    return
            entry.news.clear()
            await entry.news.wait()

    async def status(self, job_id: str) -> JobStatus | None:
        self._forget(self._clock())
        entry = self._entries.get(job_id)
        return JobStatus(entry.state, entry.job.tenant, entry.deaths, entry.end) if entry is not None else None

    async def alive(self, owner: str) -> None:
        self._owners[owner] = self._clock()

    async def is_heard(self, owner: str) -> bool:
        return self._clock() - self._owners.get(owner, -1e9) <= self.limits.lease_s

    async def stats(self) -> QueueStats:
        now = self._clock()
        return QueueStats(
            num_waiting=self._waiting.num,
            units_waiting=self._waiting.units.total(),
            num_claimed=len(self._claimed),
            num_tenants=len({tenant for _, tenant in self._waiting.lines}),
            workers=tuple(self._alive(now)),
            ended=dict(self._counts),
            num_redelivered=self._num_redelivered,
            oldest_s=max((now - line[min(line)].submitted for line in self._waiting.lines.values()), default=0.0),
        )

    async def close(self) -> None:
        return None

    # ---- records

    async def save(self, kind: str, record_id: str, text: str, *, tenant: str, keep_s: float) -> None:
        self._records[kind, record_id] = (text, tenant, self._clock() + keep_s)

    async def add(self, kind: str, record_id: str, text: str, *, tenant: str, keep_s: float) -> str | None:
        there = await self.load(kind, record_id, tenant=tenant)
        if there is None:
            await self.save(kind, record_id, text, tenant=tenant, keep_s=keep_s)
        return there

    async def remove(self, kind: str, record_id: str) -> None:
        self._records.pop((kind, record_id), None)

    async def load(self, kind: str, record_id: str, *, tenant: str) -> str | None:
        now = self._clock()
        for key in [key for key, (_, _, until) in self._records.items() if until <= now]:
            del self._records[key]
        text, owner, _ = self._records.get((kind, record_id), (None, None, 0.0))
        return text if owner == tenant else None

    async def post(self, board: str, post_id: str, text: str) -> None:
        self._boards.setdefault(board, {})[post_id] = text

    async def posted(self, board: str) -> dict[str, str]:
        return dict(self._boards.get(board, {}))

    async def take_down(self, board: str, post_id: str) -> bool:
        return self._boards.get(board, {}).pop(post_id, None) is not None

    # ---- inside

    def _claim_now(self, worker: str, num: int) -> list[Claim]:
        now = self._clock()
        claims: list[Claim] = []
        self._reclaim(now)
        while len(claims) < num and (entry := self._waiting.next()) is not None:
            self._waiting.remove(entry)
            if entry.deadline <= now:
                self._finish(entry, expired())
            elif entry.job.owner and now - self._owners.get(entry.job.owner, -1e9) > self.limits.lease_s:
                self._finish(entry, abandoned())
            else:
                claims.append(self._take(entry, worker, now))
        return claims

    def _take(self, entry: _Entry, worker: str, now: float) -> Claim:
        self._waiting.charge(entry.job, entry.job.cost)
        entry.state, entry.worker, entry.lease = "claimed", worker, now + self.limits.lease_s
        entry.delivery += 1
        self._claimed[entry.job.id] = entry
        return Claim(entry.job, entry.delivery, entry.deadline - now)

    def _reclaim(self, now: float) -> None:
        for entry in [entry for entry in self._claimed.values() if entry.lease <= now]:
            entry.deaths += 1
            if entry.deaths >= self.limits.max_deliveries:
                self._finish(entry, died(entry.deaths))
                continue
            self._num_redelivered += 1
            self._waiting.charge(entry.job, -entry.job.cost)
            self._wait_again(entry)

    def _wait_again(self, entry: _Entry) -> None:
        del self._claimed[entry.job.id]
        entry.state, entry.worker = "waiting", ""
        self._waiting.add(entry)
        self._bell.set()

    def _held(self, claim: Claim) -> _Entry | None:
        entry = self._claimed.get(claim.job.id)
        return entry if entry is not None and entry.delivery == claim.delivery else None

    def _append(self, entry: _Entry, part: Part) -> None:
        last = entry.parts[-1] if entry.parts else None
        if last is None or (part.delivery, part.seq) > (last.delivery, last.seq):
            entry.parts.append(part)
            entry.news.set()

    def _finish(self, entry: _Entry, end: End, seq: int | None = None, chunks: tuple[Chunk, ...] = ()) -> None:
        if entry.state == "waiting" and entry.number in self._waiting.lines.get((entry.job.rank, entry.job.tenant), {}):
            self._waiting.remove(entry)
        self._claimed.pop(entry.job.id, None)
        after = entry.parts[-1].seq + 1 if entry.parts else 1
        entry.state, entry.end, entry.forget_at = "ended", end, self._clock() + entry.job.keep_s
        self._append(entry, Part(entry.delivery, after if seq is None else seq, chunks, end))
        self._ended[entry.job.id] = entry
        self._counts[end.kind] += 1

    def _forget(self, now: float) -> None:
        for job_id, entry in list(self._ended.items()):
            if entry.forget_at <= now:
                del self._ended[job_id], self._entries[job_id]

    def _until_lease(self) -> float:
        return max(0.01, min((e.lease for e in self._claimed.values()), default=1e9) - self._clock())

    def _alive(self, now: float) -> list[WorkerCard]:
        return [card for card, at in self._cards.values() if now - at <= self.limits.heard_s]

    def _load(self, tenant: str, rank: Rank, now: float) -> Load:
        own = [line.values() for (_, name), line in self._waiting.lines.items() if name == tenant]
        line = self._waiting.lines.get((rank, tenant), {})
        seats, units_per_s = pace_of(self._alive(now))
        num_tenants = len({name for _, name in self._waiting.lines} | {tenant})
        return Load(
            num_waiting=self._waiting.num,
            rank_units={name: self._waiting.units[name] for name in WEIGHTS},
            tenant_num=sum(len(entries) for entries in own),
            tenant_units=sum(entry.job.cost for entry in line.values()),
            num_tenants=num_tenants,
            units_running=sum(entry.job.cost for entry in self._claimed.values()),
            num_seats=seats,
            units_per_s=units_per_s,
        )


def pace_of(cards: Sequence[WorkerCard]) -> tuple[int, float | None]:
    """Seats and units per second of all ready workers; one that has measured nothing counts as the mean."""
    ready = [card for card in cards if card.is_ready]
    known = [card for card in ready if card.units_per_s is not None]
    seats, seats_known = sum(card.seats for card in ready), sum(card.seats for card in known)
    units = sum(card.units_per_s or 0.0 for card in known)
    return seats, units * seats / seats_known if seats_known else None


def wish_of(jobs: Sequence[Job]) -> Wish:
    """What jobs of one tenant and rank ask for together."""
    return Wish(
        tenant=jobs[0].tenant,
        rank=jobs[0].rank,
        num=len(jobs),
        units=sum(job.cost for job in jobs),
        largest=max(job.cost for job in jobs),
        deadline_s=min(job.deadline_s for job in jobs),
        mark=hash(tuple((job.tenant, *_asked(job.request), job.request.sampling.max_tokens) for job in jobs)),
    )


def _asked(request: Request) -> tuple[object, ...]:
    return request.prompt_ids, request.passed and request.passed.body


def expired() -> End:
    """Of a job whose time was over before a worker took it."""
    return End("expired", "its turn did not come before its deadline; try again later")


def abandoned() -> End:
    """Of a job that nobody waits for any more."""
    return End("abandoned", "the gateway that asked for it is gone; ask again")


def died(deaths: int) -> End:
    """Of a job that kills its workers, or has no luck with them."""
    return End("failed", f"{deaths} workers ended while they worked on it; it is not tried again", "engine")
