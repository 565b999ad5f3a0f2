"""The capacity model: exact where a closed form exists, and held against the events of a simulation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pingjia.cluster.plan import (
    Machine,
    Service,
    Traffic,
    erlang_c,
    plan,
    service_of,
    waiting_for_all,
    waiting_in_pool,
    waiting_in_turn,
)
from pingjia.cluster.simulate import Fleet, LeastLoaded, Simulation, Turns, poisson
from pingjia.errors import UserError

MACHINE = Machine(80.0, 4, 400.0, weights_gb=4.0, kv_gb_per_seat=0.25, price_per_hour=2.0)


def traffic_of(busy: float, num: int, machine: Machine = MACHINE) -> Traffic:
    traffic = Traffic(1, 1.0, 200.0, 100.0)
    per_s = busy * num * machine.seats / service_of(traffic, machine).mean_s
    return replace(traffic, users=round(per_s * 3600))


def test_erlang_by_hand():
    assert erlang_c(1, 0.5) == pytest.approx(0.5)  # M/M/1: the server is busy
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)  # 2 rho^2 / (1 + rho)
    a, c = 7.0, 10
    terms = [a**k / math.factorial(k) for k in range(c)]
    last = a**c / math.factorial(c) / (1 - a / c)
    assert erlang_c(c, a) == pytest.approx(last / (sum(terms) + last))


@given(seats=st.integers(1, 100), busy=st.floats(0.05, 0.97), mean_s=st.floats(0.1, 100.0))
@example(seats=2, busy=0.5, mean_s=1.0)
@settings(max_examples=60)
def test_one_replica_in_turn_is_erlangs_queue(seats, busy, mean_s):
    service = Service(mean_s, 1.0)
    turn = waiting_in_turn(seats, busy * seats / mean_s, service, of=1)
    chance = waiting_for_all(seats, busy * seats / mean_s, service)
    assert turn.probability == pytest.approx(chance.probability, rel=1e-4)
    assert turn.mean_s == pytest.approx(chance.mean_s, rel=1e-4)


def test_d_m_1_by_its_equation():
    """Many replicas in turn: arrivals like a clock. sigma = exp(-(1 - sigma) / rho)."""
    rho, sigma = 0.7, 0.5
    for _ in range(200):
        sigma = math.exp(-(1 - sigma) / rho)
    waiting = waiting_in_turn(1, rho, Service(1.0, 1.0), of=10**7)
    assert waiting.probability == pytest.approx(sigma, rel=1e-5)
    assert waiting.mean_s == pytest.approx(sigma / (1 - sigma), rel=1e-5)


@pytest.mark.parametrize(("num", "busy"), [(1, 0.7), (4, 0.7), (4, 0.85), (50, 0.8)])
def test_formula_and_simulation_agree(num, busy):
    traffic, visits = traffic_of(busy, num), 60_000
    outcome = Simulation(Fleet(MACHINE, [1.0] * num), Turns([3] * num)).run(poisson(traffic, visits, 3), skip=10_000)
    formula = waiting_in_pool(num, traffic, MACHINE, "turns")
    assert outcome.busy == pytest.approx(formula.busy, rel=0.03)
    # 50,000 requests leave some 10 % of chance on the mean.
    assert float(outcome.waits_s.mean()) == pytest.approx(formula.mean_s, rel=0.15)
    assert float((outcome.waits_s > 0).mean()) == pytest.approx(formula.probability, abs=0.05)
    least = Simulation(Fleet(MACHINE, [1.0] * num), LeastLoaded([1.0] * num)).run(
        poisson(traffic, visits, 3), skip=10_000
    )
    bound = waiting_in_pool(num, traffic, MACHINE, "least").mean_s
    assert 0.85 * bound - 0.01 <= float(least.waits_s.mean()) <= 1.1 * formula.mean_s


def test_formula_and_simulation_agree_at_ten_thousand_replicas():
    num, busy = 10_000, 0.7
    machine = Machine(100.0, 2, 400.0)
    traffic = traffic_of(busy, num, machine)
    outcome = Simulation(Fleet(machine, [1.0] * num), LeastLoaded([1.0] * num)).run(
        poisson(traffic, 60_000, 1), skip=30_000
    )
    assert waiting_in_pool(num, traffic, machine, "least").mean_s < 1e-6
    assert outcome.waits_s.mean() < 1e-6
    outcome = Simulation(Fleet(machine, [1.0] * num), Turns([1] * num)).run(poisson(traffic, 200_000, 1), skip=100_000)
    formula = waiting_in_pool(num, traffic, machine, "turns")
    assert formula.mean_s > 0.1
    assert outcome.busy == pytest.approx(formula.busy, rel=0.03)
    assert float(outcome.waits_s.mean()) == pytest.approx(formula.mean_s, rel=0.1)
    assert float(np.quantile(outcome.waits_s, 0.95)) == pytest.approx(formula.p95_s, rel=0.1)


@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=7))
def test_turns_are_nginxs_own(weights):
    """Against the algorithm as its source describes it, and by weight over a whole round."""
    policy, current = Turns(weights), [0] * len(weights)
    chosen = []
    for _ in range(sum(weights)):
        current = [c + w for c, w in zip(current, weights, strict=True)]
        best = current.index(max(current))
        current[best] -= sum(weights)
        chosen.append(policy.choose(None, []))
        assert chosen[-1] == best
    assert [chosen.count(i) for i in range(len(weights))] == weights


@given(users=st.integers(1, 20_000), more=st.integers(1, 20_000), wait=st.floats(0.2, 20.0))
@settings(max_examples=60)
def test_a_plan_suffices_and_one_less_does_not(users, more, wait):
    traffic = Traffic(users, 6.0, 200.0, 100.0)
    made = plan(traffic, MACHINE, max_wait_s=wait)
    assert made.waiting.p95_s <= wait
    assert made.waiting.busy <= 0.85 + 1e-9
    if made.needed > 1:
        less = waiting_in_pool(made.needed - 1, traffic, MACHINE, "turns")
        assert less.p95_s > wait or less.busy > 0.85
    assert plan(replace(traffic, users=users + more), MACHINE, max_wait_s=wait).needed >= made.needed
    assert made.replicas == made.needed + 1
    assert made.memory_gb == made.replicas * 5.0
    assert made.cost_per_month == made.replicas * 2.0 * 730


@pytest.mark.parametrize(
    "change", [{"answer_tokens": 0.0}, {"prompt_tokens": -1.0}, {"requests_per_user": math.nan}, {"cached_share": 1.0}]
)
def test_figures_that_make_no_sense(change):
    with pytest.raises(UserError, match=r"number above 0|cached share"):
        plan(replace(Traffic(10, 1.0, 10.0, 10.0), **change), MACHINE)
