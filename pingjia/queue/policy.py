"""Who is next, who is refused, and when they should come back. Pure: no clock, no sockets; `now` is handed in.

Fairness is that of virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024):
whoever waits and has been served the fewest tokens is next. It holds twice: between ranks, by weight, and inside a rank
between tenants. So a low rank is slow and never starves, and a key's thousand requests delay another key's by one.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pingjia.errors import Overloaded
from pingjia.queue.job import Rank

WEIGHTS: Mapping[str, float] = {"high": 64.0, "normal": 8.0, "low": 1.0}
_MAX_RETRY_S = 600.0
# Estimated waits turn out longer: paces vary, and a seat is empty between two answers. A newcomer must have much room,
# who is told to come back is told a time with some to spare, and who does come back is let in if it can be done at all.
_SLACK_NEW, _SLACK_TOLD, _SLACK_BACK = 1.5, 1.2, 1.0
_EARLY_S = 1.0  # Retry-After has whole seconds, and clients are not exact
_LATE = 1.25
_MAX_LINE = 10  # promises a tenant may have open, in shares of the queue; beyond it no memory is spent
_KEYED_SHARE = 0.75  # of the queue, for a key that is alone: the next key must find room
_CROWDED = 0.5  # from this fill on, no key may hold more than its equal part


class ShareExceeded(Overloaded):
    """The queue has room, but this tenant holds its share of it already. HTTP 429."""


class FairShare:
    """Counters of what each flow was served. The waiting flow with the least is next; ties go by name."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = weights or {}
        self._waiting: dict[str, float] = {}
        self._served: dict[str, float] = {}
        self._last_left = 0.0

    def join(self, flow: str) -> None:
        """The flow has something waiting now. It gets no credit for the time it had not."""
        if flow not in self._waiting:
            floor = min(self._waiting.values(), default=self._last_left)
            self._waiting[flow] = max(floor, self._served.pop(flow, 0.0))

    def leave(self, flow: str) -> None:
        """It has nothing waiting any more."""
        self._last_left = self._served[flow] = self._waiting.pop(flow)

    def next(self) -> str | None:
        """Whose turn it is; None when nobody waits."""
        return min(self._waiting, key=lambda flow: (self._waiting[flow], flow), default=None)

    def charge(self, flow: str, units: float) -> None:
        """The flow was served that much (less than nothing: given back)."""
        counters = self._waiting if flow in self._waiting else self._served
        counters[flow] = counters.get(flow, 0.0) + units / self._weights.get(flow, 1.0)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def counter(self, flow: str) -> float:
        """What the flow was served, in its own weight."""
        return self._waiting.get(flow, self._served.get(flow, 0.0))


@dataclass(frozen=True, slots=True)
class Limits:
    """What a queue holds, and how it finds out that a worker is dead."""

    max_requests: int = 1_000
    max_units: int = 2_000_000
    lease_s: float = 10.0
    max_deliveries: int = 3

    @property
    def heard_s(self) -> float:
        """Who was not heard of for this long is not ready, though what it claimed stays its own for the lease."""
        return min(self.lease_s, 2.4)  # a worker says so every second, and a gateway looks twice as often


@dataclass(frozen=True, slots=True)
class Load:
    """A queue as one tenant's next request finds it. Units are tokens (`Job.cost`).

    rank_units: what waits, by rank. tenant_*: what the tenant has waiting; tenant_units only in the rank it asks for.
    num_tenants: those that have something waiting in that rank, the asking one included. units_per_s: what all
    workers together were measured to do; None before anything was. seat_units_per_s: the same of one seat.
    """

    num_waiting: int = 0
    rank_units: Mapping[str, int] = field(default_factory=dict)
    tenant_num: int = 0
    tenant_units: int = 0
    num_tenants: int = 1
    units_running: int = 0
    num_seats: int = 0
    units_per_s: float | None = None

    @property
    def units_waiting(self) -> int:
        return sum(self.rank_units.values())

    def units_ahead(self, rank: Rank, cost: int) -> float:
        """What will be begun before a request of that rank and cost: never more than all there is."""
        total = self.rank_units.get(rank, 0)
        ahead: float = min(self.tenant_units * self.num_tenants + cost * (self.num_tenants - 1), total)
        own = ahead + cost
        for other, units in self.rank_units.items():
            if other != rank:
                ahead += min(units, own * WEIGHTS[other] / WEIGHTS[rank])
        return ahead

    def wait_s(self, rank: Rank, cost: int) -> float | None:
        """Seconds until such a request would be begun, from the measured pace; None when nothing was measured."""
        if not self.units_per_s or self.num_seats == 0:
            return None
        ahead = self.units_ahead(rank, cost)
        is_full = ahead > 0 or self.num_waiting > 0
        return (ahead + (self.units_running / 2 if is_full else 0)) / self.units_per_s

    def compute_s(self, cost: int) -> float:
        """Seconds that its answer takes then."""
        return cost * self.num_seats / self.units_per_s if self.units_per_s else 0.0


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of a queue in one go. `mark`: the same for whoever asks the same again."""

    tenant: str
    rank: Rank
    num: int
    units: int
    largest: int  # units of its largest request
    deadline_s: float
    mark: int = 0


@dataclass(frozen=True, slots=True, order=True)
class _Promise:
    """Come back at `due`. Who has not come by `until` does not come."""

    until: float
    due: float
    mark: int
    tenant: str
    num: int
    units: int


class _Promises:
    """Those that are open, by mark and by the time they are over; and their sums."""

    def __init__(self) -> None:
        self.num = 0
        self.units = 0
        self.of_tenant: Counter[str] = Counter()
        self._open: dict[int, list[_Promise]] = {}
        self._by_end: list[_Promise] = []

    def add(self, promise: _Promise) -> None:
        self._open.setdefault(promise.mark, []).append(promise)
        heapq.heappush(self._by_end, promise)
        self._count(promise, 1)

    def redeem(self, mark: int, now: float) -> bool:
        """Whether one for this mark is due; it is over then."""
        promise = next((p for p in self._open.get(mark, ()) if p.due <= now + _EARLY_S), None)
        if promise is not None:
            self._close(promise)
        return promise is not None

    def forget(self, now: float) -> None:
        """Those are over for which nobody came in time."""
        while self._by_end and self._by_end[0].until <= now:
            self._close(heapq.heappop(self._by_end))

    def _close(self, promise: _Promise) -> None:
        some = self._open.get(promise.mark, [])
        if promise not in some:
            return  # redeemed before
        some.remove(promise)
        if not some:
            del self._open[promise.mark]
        self._count(promise, -1)

    def _count(self, promise: _Promise, sign: int) -> None:
        self.num += sign * promise.num
        self.units += sign * promise.units
        self.of_tenant[promise.tenant] += sign * promise.num
        if not self.of_tenant[promise.tenant]:
            del self.of_tenant[promise.tenant]


class Gate:
    """Says no in time, and keeps its word to whom it told when to come back.

    The refused stand in a line that has no memory but this one's: each is given the time at which, at the measured
    pace, its turn comes, and is known again when it asks the same. Until then newcomers find the queue fuller than it
    is by what was promised, but never more than twice as full: promises that nobody comes back for must not leave
    workers idle.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._promises = _Promises()

    def check(self, load: Load, wish: Wish, now: float) -> None:
        """Return if the wish can be kept. Raises Overloaded or ShareExceeded with the time to come back."""
        self._promises.forget(now)
        is_awaited = self._promises.redeem(wish.mark, now)
        seen, slack = (load, _SLACK_BACK) if is_awaited else (self._seen_by_newcomer(load), _SLACK_NEW)
        refusal = self._judge(seen, wish, slack)
        if refusal is None:
            return
        kind, text = refusal
        after = self._retry_s(load, wish)
        if kind is Overloaded and self._promises.of_tenant[wish.tenant] < _MAX_LINE * self.share(load, wish.tenant):
            until = now + after * _LATE + _EARLY_S
            self._promises.add(_Promise(until, now + after, wish.mark, wish.tenant, wish.num, wish.units))
        raise kind(f"{text}; come back in {after:.0f} s", retry_after_s=after)

    def share(self, load: Load, tenant: str) -> float:
        """Requests a tenant may have waiting."""
        most = self.limits.max_requests
        if load.num_tenants == 1:
            return most if tenant == "" else max(1.0, most * _KEYED_SHARE)
        if load.num_waiting < most * _CROWDED:
            return max(1.0, most * _KEYED_SHARE)
        return max(1.0, most / load.num_tenants)

    def _judge(self, load: Load, wish: Wish, slack: float) -> tuple[type[Overloaded], str] | None:
        limits, share = self.limits, self.share(load, wish.tenant)
        too_many = load.num_waiting + wish.num > limits.max_requests
        if too_many or load.units_waiting + wish.units > limits.max_units:
            return Overloaded, f"{load.num_waiting} requests with {load.units_waiting} tokens wait or were told when"
        if load.tenant_num + wish.num > share:
            text = f"this key has {load.tenant_num} requests waiting, and its share of the queue is {share:.0f} now"
            return ShareExceeded, text
        wait_s, compute_s = load.wait_s(wish.rank, wish.largest), load.compute_s(wish.largest)
        if wait_s is not None and wait_s * slack + compute_s > wish.deadline_s:
            needed_s = wait_s + compute_s
            text = (
                f"an answer would take about {needed_s:.0f} s at the measured pace and may take {wish.deadline_s:.0f}"
            )
            return Overloaded, text
        return None

    def _seen_by_newcomer(self, load: Load) -> Load:
        units = min(self._promises.units, load.units_waiting)
        if not units:
            return load
        grown = 1.0 + units / load.units_waiting
        return replace(
            load,
            num_waiting=load.num_waiting + min(self._promises.num, load.num_waiting),
            rank_units={rank: int(of * grown) for rank, of in load.rank_units.items()},
            tenant_units=int(load.tenant_units * grown),
        )

    def _retry_s(self, load: Load, wish: Wish) -> float:
        """When what is too much now, and what was promised before, will have been served."""
        if not load.units_per_s:
            return 1.0
        after = (self._excess_units(load, wish) + self._promises.units) / load.units_per_s
        return min(_MAX_RETRY_S, max(1.0, after))

    def _excess_units(self, load: Load, wish: Wish) -> float:
        """Units that must be served before the wish would be taken on; less than nothing when it would be at once."""
        limits, share = self.limits, self.share(load, wish.tenant)
        mean = load.units_waiting / max(1, load.num_waiting)
        over_share = load.tenant_num + wish.num - share
        excess = [
            (load.num_waiting + wish.num - limits.max_requests) * mean,
            load.units_waiting + wish.units - limits.max_units,
            over_share * load.tenant_units / max(1, load.tenant_num) * load.num_tenants,
        ]
        wait_s = load.wait_s(wish.rank, wish.largest)
        if wait_s is not None:
            may_wait_s = (wish.deadline_s - load.compute_s(wish.largest)) / _SLACK_TOLD
            excess.append((wait_s - may_wait_s) * (load.units_per_s or 0.0))
        return max(excess)


class Pace:
    """Units per second of one seat, over the jobs that ended: the mean of the last few dozen."""

    _SMOOTHING = 0.05

    def __init__(self) -> None:
        self._units = 0.0
        self._seconds = 0.0

    def add(self, units: float, seconds: float) -> None:
        """A job of that cost held its seat that long."""
        keep = 1.0 - self._SMOOTHING if self._seconds else 0.0
        weight = 1.0 - keep
        self._units = keep * self._units + weight * units
        self._seconds = keep * self._seconds + weight * max(seconds, 1e-6)

    @property
    def units_per_s(self) -> float | None:
        return self._units / self._seconds if self._seconds else None


class ArrivalRate:
    """Requests per second over the last second or so: two counters, no list."""

    def __init__(self, window_s: float = 1.0) -> None:
        self._window_s = window_s
        self._start = 0.0
        self._now = 0
        self._before = 0

    def add(self, now: float) -> None:
        """One came."""
        self._roll(now)
        self._now += 1

    def per_s(self, now: float) -> float:
        """The rate, the window before counted by what of it is still less than a window ago."""
        self._roll(now)
        part = 1.0 - (now - self._start) / self._window_s
        return (self._now + self._before * max(0.0, part)) / self._window_s

    def _roll(self, now: float) -> None:
        passed = int((now - self._start) // self._window_s)
        if passed:
            self._before = self._now if passed == 1 else 0
            self._now = 0
            self._start += passed * self._window_s
