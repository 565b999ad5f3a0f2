"""A pool by events: the same policies that serve, on thousands of replicas, against the formulas of `plan.py`.

Time is simulated; a run of ten thousand replicas takes seconds. A replica has seats, a queue and a memory of
conversations. Not here: drawing arrivals from anything but chance.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pingjia.cluster.affinity import Beginnings
from pingjia.cluster.plan import Machine, Traffic
from pingjia.cluster.ring import BoundedRing
from pingjia.types import Request


@dataclass(frozen=True, slots=True)
class Visit:
    """One request. conversation: whose prompt it continues; `num_cached` of its tokens an earlier turn computed."""

    at_s: float
    prompt_tokens: float
    answer_tokens: float
    conversation: int = 0
    num_cached: float = 0.0
    request: Request | None = None


class Policy(Protocol):
    """Which replica, by number. `loads`: requests in each, waiting ones too."""

    def choose(self, visit: Visit, loads: list[int]) -> int: ...

    def changed(self, replica: int, load: int) -> None:
        """A replica's load is another now."""
        ...


@dataclass(slots=True)
class Fleet:
    """Equal machines of unequal speed: `speeds` multiply the machine's rates. remembers: conversations each keeps."""

    machine: Machine
    speeds: Sequence[float]
    remembers: int = 64


@dataclass(slots=True)
class Outcome:
    """What came of it. waits_s in order of arrival; num_served and busy_s by replica."""

    waits_s: np.ndarray
    num_served: np.ndarray
    busy_s: np.ndarray
    num_known: int
    num_seats: int
    until_s: float
    first_s: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def busy(self) -> float:
        """Part of seat-seconds in which an answer was computed."""
        return float(self.busy_s.sum() / (self.until_s * self.num_seats * len(self.busy_s)))


def poisson(traffic: Traffic, num: int, seed: int) -> Iterator[Visit]:
    """Requests by chance, answers of exponential length: what the formulas assume."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1.0 / traffic.requests_per_s, num))
    lengths = rng.exponential(traffic.answer_tokens, num)
    cached = traffic.prompt_tokens * traffic.cached_share
    for at_s, length in zip(times.tolist(), lengths.tolist(), strict=True):
        yield Visit(at_s, traffic.prompt_tokens - cached, length)


class Simulation:
    """One run. `run` once."""

    def __init__(self, fleet: Fleet, policy: Policy) -> None:
        num = len(fleet.speeds)
        self._fleet, self._policy = fleet, policy
        self._loads = [0] * num
        self._free = [fleet.machine.seats] * num
        self._queues: list[deque[tuple[int, Visit]]] = [deque() for _ in range(num)]
        self._memories: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num)]
        self._ends: list[tuple[float, int]] = []
        self._waits: list[float] = []
        self._firsts: list[float] = []
        self._served = np.zeros(num, dtype=np.int64)
        self._busy = np.zeros(num)
        self._num_known = 0

    def run(self, visits: Iterable[Visit], *, skip: int = 0) -> Outcome:
        """Let all visits come; the first `skip` count in no waiting time: the pool is empty then."""
        at_s = 0.0
        for number, visit in enumerate(visits):
            at_s = visit.at_s
            self._until(at_s)
            self._arrive(number, visit)
        until_s = at_s
        self._until(float("inf"))
        waits, firsts = np.array(self._waits[skip:]), np.array(self._firsts[skip:])
        return Outcome(waits, self._served, self._busy, self._num_known, self._fleet.machine.seats, until_s, firsts)

    def _until(self, time_s: float) -> None:
        while self._ends and self._ends[0][0] <= time_s:
            end_s, replica = heapq.heappop(self._ends)
            self._change(replica, -1)
            if self._queues[replica]:
                self._begin(replica, *self._queues[replica].popleft(), end_s)
            else:
                self._free[replica] += 1

    def _arrive(self, number: int, visit: Visit) -> None:
        replica = self._policy.choose(visit, self._loads)
        self._change(replica, 1)
        self._waits.append(0.0)
        self._firsts.append(0.0)
        if self._free[replica]:
            self._free[replica] -= 1
            self._begin(replica, number, visit, visit.at_s)
        else:
            self._queues[replica].append((number, visit))

    def _begin(self, replica: int, number: int, visit: Visit, now_s: float) -> None:
        machine, speed = self._fleet.machine, self._fleet.speeds[replica]
        known = visit.num_cached if self._knows(replica, visit) else 0.0
        prefill_s = (visit.prompt_tokens - known) / (machine.prefill_tokens_per_s * speed)
        took_s = prefill_s + visit.answer_tokens * machine.seats / (machine.tokens_per_s * speed)
        self._waits[number] = now_s - visit.at_s
        self._firsts[number] = now_s - visit.at_s + prefill_s
        self._served[replica] += 1
        self._busy[replica] += took_s
        heapq.heappush(self._ends, (now_s + took_s, replica))

    def _knows(self, replica: int, visit: Visit) -> bool:
        """Whether the conversation was here lately; from now on it was."""
        if not visit.conversation:
            return False
        memory = self._memories[replica]
        known = visit.conversation in memory
        self._num_known += known
        memory[visit.conversation] = None
        memory.move_to_end(visit.conversation)
        if len(memory) > self._fleet.remembers:
            memory.popitem(last=False)
        return known

    def _change(self, replica: int, by: int) -> None:
        self._loads[replica] += by
        self._policy.changed(replica, self._loads[replica])


class Turns:
    """nginx's smooth weighted round robin, number for number."""

    def __init__(self, weights: Sequence[int]) -> None:
        self._weights = np.array(weights, dtype=np.int64)
        self._total = int(self._weights.sum())
        self._current = np.zeros_like(self._weights)

    def choose(self, visit: Visit, loads: list[int]) -> int:
        self._current += self._weights
        best = int(self._current.argmax())
        self._current[best] -= self._total
        return best

    def changed(self, replica: int, load: int) -> None:
        pass


class LeastLoaded:
    """The replica with the least in work for its weight, as a gateway chooses; among equals the next in turn."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = weights
        self._num = 0
        self._versions = [0] * len(weights)
        self._heap = [(1.0 / w, i, i, 0) for i, w in enumerate(weights)]
        heapq.heapify(self._heap)

    def choose(self, visit: Visit, loads: list[int]) -> int:
        while True:
            _, _, replica, version = self._heap[0]
            if version == self._versions[replica]:
                return replica
            heapq.heappop(self._heap)  # an older load of this replica

    def changed(self, replica: int, load: int) -> None:
        self._versions[replica] += 1
        self._num += 1
        entry = ((load + 1) / self._weights[replica], self._num, replica, self._versions[replica])
        heapq.heappush(self._heap, entry)


class Affine:
    """What `PrefixAffinity` does, without walking over all replicas for every request."""

    def __init__(self, weights: Sequence[float], *, spread: float = 1.25, points: int = 64) -> None:
        self._beginnings = Beginnings()
        self._least = LeastLoaded(weights)
        self._numbers = {str(i): i for i in range(len(weights))}
        self._ring = BoundedRing({str(i): w for i, w in enumerate(weights)}, spread=spread, points=points)
        self._num_in_work = 0
        self._loads = [0] * len(weights)

    def choose(self, visit: Visit, loads: list[int]) -> int:
        assert visit.request is not None
        key = self._beginnings.key_of(visit.request, len(loads))
        if key is None:
            return self._least.choose(visit, loads)
        return self._numbers[self._ring.pick(key, lambda name: loads[self._numbers[name]], self._num_in_work)]

    def changed(self, replica: int, load: int) -> None:
        self._num_in_work += load - self._loads[replica]
        self._loads[replica] = load
        self._least.changed(replica, load)
