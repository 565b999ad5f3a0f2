"""How many replicas a number of users needs: queueing formulas, and what that many cost. Pure arithmetic.

A replica answers `seats` requests at once, each at an equal part of its full speed. nginx deals requests out in turn,
so each replica has a queue of its own, with arrivals more even than chance; a gateway that sees all replicas' loads
has one queue for all. Held against a simulation of the same policies in `simulate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pingjia.errors import UserError

HOURS_PER_MONTH = 730.0
_MAX_REPLICAS = 1_000_000
Balance = Literal["turns", "least"]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Who asks. requests_per_user: an hour, at the busiest time. cached_share: of prompts, found in the cache."""

    users: int
    requests_per_user: float
    prompt_tokens: float
    answer_tokens: float
    cached_share: float = 0.0

    @property
    def requests_per_s(self) -> float:
        return self.users * self.requests_per_user / 3600.0


@dataclass(frozen=True, slots=True)
class Machine:
    """One replica, as measured. tokens_per_s: of all its answers together, all seats taken."""

    tokens_per_s: float
    seats: int
    prefill_tokens_per_s: float
    weights_gb: float = 0.0
    kv_gb_per_seat: float = 0.0
    price_per_hour: float = 0.0

    @property
    def memory_gb(self) -> float:
        return self.weights_gb + self.seats * self.kv_gb_per_seat


@dataclass(frozen=True, slots=True)
class Service:
    """How long one answer takes: mean seconds, and variance over the mean's square.

    Lengths of answers are taken as exponential: many short ones, few long ones.
    """

    mean_s: float
    variation: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """What requests wait for a seat: probability, mean and the 95th of 100, in seconds. busy: part of seats taken."""

    busy: float
    probability: float
    mean_s: float
    p95_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """`needed` carry the load; `replicas` are these and the spare ones."""

    needed: int
    replicas: int
    service: Service
    waiting: Waiting
    requests_per_s: float
    memory_gb: float
    cost_per_month: float


def service_of(traffic: Traffic, machine: Machine) -> Service:
    """One answer on a replica whose seats are all taken."""
    prefill_s = traffic.prompt_tokens * (1.0 - traffic.cached_share) / machine.prefill_tokens_per_s
    decode_s = traffic.answer_tokens * machine.seats / machine.tokens_per_s
    mean_s = prefill_s + decode_s
    return Service(mean_s, (decode_s / mean_s) ** 2)


def erlang_c(seats: int, load: float) -> float:
    """Probability that all of `seats` are taken when a request comes; load in Erlang, below `seats`."""
    blocked = 1.0  # Erlang B by its recursion: no factorials, so any number of seats
    for i in range(1, seats + 1):
        blocked = load * blocked / (i + load * blocked)
    return blocked / (1.0 - (load / seats) * (1.0 - blocked))


def waiting_for_all(seats: int, arrivals_per_s: float, service: Service) -> Waiting:
    """Waiting before `seats` seats with one queue, arrivals by chance: Erlang C, scaled as Allen and Cunneen do."""
    load = arrivals_per_s * service.mean_s
    busy = load / seats
    if busy >= 1.0:
        return Waiting(busy, 1.0, math.inf, math.inf)
    return _waiting(busy, erlang_c(seats, load), service.mean_s / (seats * (1.0 - busy)), (1.0 + service.variation) / 2)


def waiting_in_turn(seats: int, arrivals_per_s: float, service: Service, of: int) -> Waiting:
    """Waiting at one of `of` replicas that get arrivals in turn: GI/M/c by Takacs, scaled for the service's variation.

    The gap between two arrivals at one replica is the sum of `of` gaps by chance (Erlang): nearly a clock for many.
    """
    rate, gap_s = 1.0 / service.mean_s, 1.0 / arrivals_per_s
    busy = arrivals_per_s / (seats * rate)
    if busy >= 1.0:
        return Waiting(busy, 1.0, math.inf, math.inf)

    def transform(s: float) -> float:
        """E[exp(-s gap)]."""
        return math.exp(-of * math.log1p(s * gap_s / of))

    root = _root(lambda x: transform(seats * rate * (1.0 - x)))
    if abs(seats * (1.0 - root) - round(seats * (1.0 - root))) < 1e-7:
        # A term of the sum is 0 / 0 there, with a limit: look beside it.
        return waiting_in_turn(seats, arrivals_per_s * (1.0 + 1e-6), service, of)
    total, ratio = 1.0 / (1.0 - root), 1.0
    for j in range(1, seats + 1):
        phi = transform(j * rate)
        ratio *= (seats - j + 1) / j * (1.0 - phi) / phi
        total += ratio / (1.0 - phi) * (seats * (1.0 - phi) - j) / (seats * (1.0 - root) - j)
    probability = min(1.0, 1.0 / (total * (1.0 - root)))
    scale = _wait_beside(busy, 1.0 / of, service.variation) / _wait_beside(busy, 1.0 / of, 1.0)
    return _waiting(busy, probability, 1.0 / (seats * rate * (1.0 - root)), scale)


def _wait_beside(busy: float, arrivals: float, services: float) -> float:
    """How waiting depends on both variations, by Kraemer and Langenbach-Belz."""
    both = arrivals + services
    return both * math.exp(-2.0 * (1.0 - busy) * (1.0 - arrivals) ** 2 / (3.0 * busy * both)) if both else 0.0


def _waiting(busy: float, probability: float, pace_s: float, scale: float) -> Waiting:
    """From an exponential tail: who waits at all waits `pace_s` * scale on average."""
    wait_s = pace_s * scale
    return Waiting(busy, probability, probability * wait_s, max(0.0, wait_s * math.log(max(probability / 0.05, 1.0))))


def _root(f: Callable[[float], float]) -> float:
    """The x in (0, 1) with f(x) = x, f convex and f(1) = 1."""
    low, high = 0.0, 1.0 - 1e-12
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > middle else (low, middle)
    return low


def waiting_in_pool(replicas: int, traffic: Traffic, machine: Machine, balance: Balance) -> Waiting:
    """Waiting in a pool of equal replicas. `least` is a bound from below: no request can change its queue later."""
    service, arrivals = service_of(traffic, machine), traffic.requests_per_s
    if balance == "least":
        return waiting_for_all(replicas * machine.seats, arrivals, service)
    return waiting_in_turn(machine.seats, arrivals / replicas, service, replicas)


def plan(
    traffic: Traffic,
    machine: Machine,
    *,
    max_wait_s: float = 2.0,
    max_busy: float = 0.85,
    spare: int = 1,
    balance: Balance = "turns",
) -> Plan:
    """The fewest replicas at which 95 of 100 requests wait `max_wait_s` at most and seats are `max_busy` taken.

    Raises UserError when a figure makes no sense, or no number of replicas is enough.
    """
    _check(traffic, machine, max_wait_s, max_busy)
    service = service_of(traffic, machine)
    load = traffic.requests_per_s * service.mean_s
    needed = max(1, math.ceil(load / machine.seats / max_busy - 1e-9))

    def suffices(replicas: int) -> bool:
        return waiting_in_pool(replicas, traffic, machine, balance).p95_s <= max_wait_s

    needed = _least(suffices, needed)
    replicas = needed + spare
    return Plan(
        needed=needed,
        replicas=replicas,
        service=service,
        waiting=waiting_in_pool(needed, traffic, machine, balance),
        requests_per_s=traffic.requests_per_s,
        memory_gb=replicas * machine.memory_gb,
        cost_per_month=replicas * machine.price_per_hour * HOURS_PER_MONTH,
    )


def _least(suffices: Callable[[int], bool], start: int) -> int:
    """The smallest number from `start` on that suffices: more replicas never wait longer."""
    low, high = start, start
    while not suffices(high):
        low, high = high + 1, high * 2
        if high > _MAX_REPLICAS:
            raise UserError(f"more than {_MAX_REPLICAS:,} replicas would be needed; allow a longer wait")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle + 1, high)
    return low


def _check(traffic: Traffic, machine: Machine, max_wait_s: float, max_busy: float) -> None:
    positive = {
        "users": traffic.users,
        "requests per user": traffic.requests_per_user,
        "answer tokens": traffic.answer_tokens,
        "prompt tokens": traffic.prompt_tokens,
        "tokens/s": machine.tokens_per_s,
        "seats": machine.seats,
        "prefill tokens/s": machine.prefill_tokens_per_s,
        "longest wait": max_wait_s,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise UserError(f"{name}: {value} cannot be planned with; give a number above 0")
    if not 0 < max_busy < 1 or not 0 <= traffic.cached_share < 1:
        raise UserError(f"busy {max_busy} must be between 0 and 1, the cached share {traffic.cached_share} from 0 to 1")
