"""Three times more than can be done, in simulated time: the queue's promises to those it takes and those it refuses."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter

import pytest

from pingjia.errors import Overloaded
from pingjia.queue.job import End, Job
from pingjia.queue.memory import MemoryQueue
from pingjia.queue.policy import Limits, Pace
from pingjia.queue.protocol import WorkerCard
from pingjia.types import Request, Sampling

SEATS, TOKEN_S, TOTAL_S, DEADLINE_S = 8, 0.01, 60.0, 10.0


class Simulation:
    """Clients that arrive at random, a worker with seats, and a clock that jumps from event to event."""

    def __init__(self, *, come_back: bool, overload: float) -> None:
        self.come_back = come_back
        self.rng, self.now = random.Random(4), 0.0
        self.queue = MemoryQueue(Limits(max_requests=10_000, lease_s=1e9), clock=lambda: self.now)
        self.events: list = []
        self.number = itertools.count()
        self.pace, self.arrived = Pace(), {}
        self.free, self.busy_s = SEATS, 0.0
        self.results: Counter[str] = Counter()
        mean_s = (10 + 100) / 2 * TOKEN_S
        rate, at = overload * SEATS / mean_s, 0.0
        while (at := at + self.rng.expovariate(rate)) < TOTAL_S:
            self.plan(at, self.arrive, next(self.number), self.rng.randint(10, 100), False)
        for second in range(int(TOTAL_S) * 4):
            self.plan(second, self.beat)

    def plan(self, at, act, *args):
        heapq.heappush(self.events, (at, next(self.number), act, args))

    async def run(self):
        while self.events:
            self.now, _, act, args = heapq.heappop(self.events)
            await act(*args)
            await self.fill()

    async def beat(self):
        pace = self.pace.units_per_s
        await self.queue.beat(WorkerCard("w", SEATS, units_per_s=pace and pace * SEATS), [])

    async def arrive(self, number, tokens, again):
        # Prompts differ, as people's do: so who comes back is known again.
        request = Request(f"j{number}-{again}", (number,), Sampling(max_tokens=tokens))
        job = Job(request, deadline_s=DEADLINE_S)
        try:
            await self.queue.submit([job])
            self.arrived[job.id] = self.now
            self.results["came back and got in" if again else "got in"] += 1
        except Overloaded as e:
            self.results["came back in vain" if again else "refused"] += 1
            if self.come_back and not again:
                self.plan(self.now + -(-e.retry_after_s // 1), self.arrive, number, tokens, True)

    async def fill(self):
        for claim in await self.queue.claim("w", self.free, 0.0):
            self.free -= 1
            seconds = claim.job.request.sampling.max_tokens * TOKEN_S
            self.plan(self.now + seconds, self.end, claim, seconds)

    async def end(self, claim, seconds):
        self.free += 1
        self.pace.add(claim.job.cost, seconds)
        self.busy_s += seconds if self.now < TOTAL_S else 0.0
        await self.queue.end(claim, 1, (), End("done"), claim.job.cost)
        in_time = self.now - self.arrived[claim.job.id] <= DEADLINE_S
        self.results["in time" if in_time else "late"] += 1


@pytest.mark.parametrize("come_back", [True, False])
async def test_three_times_overload(come_back):
    simulation = Simulation(come_back=come_back, overload=3.0)
    await simulation.run()
    results = simulation.results
    ended = (await simulation.queue.stats()).ended
    assert simulation.busy_s >= 0.9 * SEATS * TOTAL_S, "goodput"
    taken = results["got in"] + results["came back and got in"]
    assert sum(ended.values()) == taken, "every one that was taken on ended"
    assert results["in time"] >= 0.95 * taken, (results, ended)
    assert results["refused"] > 0.4 * (results["refused"] + results["got in"])
    if come_back:
        came = results["came back and got in"] + results["came back in vain"]
        assert results["came back and got in"] >= 0.95 * came, results


async def test_no_overload_no_refusal():
    simulation = Simulation(come_back=True, overload=0.8)
    await simulation.run()
    assert simulation.results["refused"] == 0
    assert simulation.results["late"] == 0
