"""Who is next and who is refused, as properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.errors import Overloaded
from pingjia.queue.policy import WEIGHTS, ArrivalRate, FairShare, Gate, Limits, Load, Pace, ShareExceeded, Wish

COSTS = st.integers(1, 100)


@given(st.dictionaries(st.sampled_from("abcde"), st.lists(COSTS, min_size=1, max_size=30), min_size=2))
def test_those_who_wait_are_served_alike(lines):
    """While two flows wait, what they were served differs by less than the two largest requests."""
    share = FairShare()
    left = {flow: list(costs) for flow, costs in lines.items()}
    for flow in left:
        share.join(flow)
    served = dict.fromkeys(left, 0)
    largest = max(cost for costs in lines.values() for cost in costs)
    while (flow := share.next()) is not None:
        served[flow] += left[flow][0]
        share.charge(flow, left[flow].pop(0))
        if not left[flow]:
            share.leave(flow)
        waiting = [served[name] for name, costs in left.items() if costs]
        if waiting:
            assert max(waiting) - min(waiting) <= largest
    assert served == {flow: sum(costs) for flow, costs in lines.items()}


@given(st.lists(st.tuples(st.sampled_from("abc"), COSTS), min_size=1, max_size=60), COSTS)
def test_who_was_away_gets_no_credit(history, cost):
    """A flow that joins late never has a lower counter than those that wait: it cannot take many turns in a row."""
    share = FairShare()
    for flow, units in history:
        share.join(flow)
        share.charge(flow, units)
    waiting = min(share.counter(flow) for flow, _ in history)
    share.join("late")
    assert share.counter("late") >= waiting
    share.charge("late", cost)
    share.leave("late")
    share.join("late")
    assert share.counter("late") >= waiting + cost


def test_weights_are_shares_of_what_is_served():
    share = FairShare(WEIGHTS)
    for rank in WEIGHTS:
        share.join(rank)
    served = dict.fromkeys(WEIGHTS, 0)
    for _ in range(7300):
        rank = share.next()
        served[rank] += 1
        share.charge(rank, 1)
    assert {rank: round(num / 100) for rank, num in served.items()} == {"high": 64, "normal": 8, "low": 1}


LOADS = st.builds(
    Load,
    num_waiting=st.integers(0, 20),
    rank_units=st.fixed_dictionaries({rank: st.integers(0, 5000) for rank in WEIGHTS}),
    tenant_num=st.integers(0, 20),
    tenant_units=st.integers(0, 5000),
    num_tenants=st.integers(1, 10),
    units_running=st.integers(0, 5000),
    num_seats=st.integers(1, 16),
    units_per_s=st.one_of(st.none(), st.floats(0.1, 1e4)),
)
WISHES = st.builds(
    Wish,
    tenant=st.sampled_from(["", "a"]),
    rank=st.sampled_from(list(WEIGHTS)),
    num=st.integers(1, 4),
    units=st.integers(4, 400),
    largest=st.integers(1, 100),
    deadline_s=st.floats(0.1, 1000),
)


@given(LOADS, WISHES)
def test_what_is_taken_on_fits_and_can_be_in_time(load, wish):
    gate = Gate(Limits(max_requests=20, max_units=12_000))
    refused = None
    try:
        gate.check(load, wish, 0.0)
    except Overloaded as e:
        refused = e
    if refused is not None:
        assert 1.0 <= refused.retry_after_s <= 600.0
        return
    assert load.num_waiting + wish.num <= 20
    assert load.units_waiting + wish.units <= 12_000
    assert load.tenant_num + wish.num <= gate.share(load, wish.tenant)
    wait_s = load.wait_s(wish.rank, wish.largest)
    assert wait_s is None or wait_s + load.compute_s(wish.largest) <= wish.deadline_s


@given(st.floats(1.0, 50.0), st.floats(0.0, 100.0))
def test_who_comes_back_finds_more_room_than_a_newcomer(pace, late_s):
    """When told, a request is let in where an equal one that comes for the first time is not."""
    units = {"normal": int(30 * pace)}
    full = Load(9, units, 9, units["normal"], num_seats=1, units_per_s=pace)
    gate, wish = Gate(Limits()), Wish("", "normal", 1, 10, 10, 20.0 + 10 / pace, 1)
    when = refuse(gate, full, wish, 0.0)
    assert when >= 10.0
    left = int(18 * pace)
    reduced = Load(9, {"normal": left}, 9, left, num_seats=1, units_per_s=pace)
    late_s = min(late_s, 0.2 * when)
    refuse(gate, reduced, Wish("", "normal", 1, 10, 10, 20.0 + 10 / pace, 2), when + late_s)
    gate.check(reduced, wish, when + late_s)


@given(LOADS, COSTS)
def test_nobody_waits_for_more_than_there_is(load, cost):
    for rank in WEIGHTS:
        assert 0 <= load.units_ahead(rank, cost) <= load.units_waiting
    assert load.units_ahead("high", cost) <= load.units_waiting


@given(st.lists(COSTS, min_size=2, max_size=20))
def test_the_refused_do_not_come_back_all_at_once(costs):
    """Each is told a time that is later than the last one's by what the last one asked for."""
    gate = Gate(Limits(max_requests=10))
    load = Load(num_waiting=10, rank_units={"normal": 1000}, num_seats=4, units_per_s=50.0)
    times = [refuse(gate, load, Wish("", "normal", 1, cost, cost, 600.0, i), 0.0) for i, cost in enumerate(costs)]
    for (cost, first), second in zip(zip(costs, times, strict=True), times[1:], strict=False):
        assert second == pytest.approx(min(600.0, first + cost / 50.0))


def refuse(gate, load, wish, now):
    with pytest.raises(Overloaded) as caught:
        gate.check(load, wish, now)
    return caught.value.retry_after_s


def test_who_comes_back_in_time_is_let_in_before_newcomers():
    gate = Gate(Limits(max_requests=10))
    full = Load(num_waiting=10, rank_units={"normal": 1000}, num_seats=4, units_per_s=50.0)
    asked = [Wish("", "normal", 1, 100, 100, 600.0, mark) for mark in range(4)]
    times = [refuse(gate, full, wish, 0.0) for wish in asked]
    assert times == [2.0, 4.0, 6.0, 8.0]
    room = Load(num_waiting=8, rank_units={"normal": 800}, num_seats=4, units_per_s=50.0)
    refuse(gate, room, Wish("", "normal", 1, 100, 100, 600.0, 99), 3.0)
    gate.check(room, asked[0], 3.0)
    gate.check(room, asked[1], 3.0)
    assert refuse(gate, full, asked[2], 3.0) > 6.0, "too early is not in time"
    half = Load(num_waiting=5, rank_units={"normal": 500}, num_seats=4, units_per_s=50.0)
    gate.check(half, Wish("", "normal", 1, 100, 100, 600.0, 98), 3.0)


def test_promises_are_forgotten():
    gate = Gate(Limits(max_requests=10))
    full = Load(num_waiting=10, rank_units={"normal": 1000}, num_seats=4, units_per_s=50.0)
    for mark in range(5):
        refuse(gate, full, Wish("", "normal", 1, 100, 100, 600.0, mark), 0.0)
    assert refuse(gate, full, Wish("", "normal", 1, 100, 100, 600.0, 9), 100.0) == 2.0


def test_one_key_leaves_room_for_the_next():
    gate = Gate(Limits(max_requests=100))
    units = {"normal": 1000}
    alone = Load(num_waiting=75, rank_units=units, tenant_num=75, tenant_units=1000)
    with pytest.raises(ShareExceeded, match="75 requests waiting, and its share of the queue is 75"):
        gate.check(alone, Wish("a", "normal", 1, 10, 10, 600.0), 0.0)
    gate.check(alone, Wish("", "normal", 1, 10, 10, 600.0), 0.0)
    crowded = Load(num_waiting=75, rank_units=units, tenant_num=25, tenant_units=300, num_tenants=4)
    with pytest.raises(ShareExceeded, match="share of the queue is 25"):
        gate.check(crowded, Wish("b", "normal", 1, 10, 10, 600.0), 0.0)


def test_an_idle_machine_takes_what_one_answer_takes():
    load = Load(num_seats=4, units_per_s=40.0)
    assert (load.wait_s("normal", 100), load.compute_s(100)) == (0.0, pytest.approx(10.0))
    Gate(Limits()).check(load, Wish("", "normal", 1, 100, 100, 10.001), 0.0)
    assert Load(num_seats=4).wait_s("normal", 100) is None


def test_pace_is_units_by_seconds():
    pace = Pace()
    assert pace.units_per_s is None
    for _ in range(50):
        pace.add(100, 4.0)
        pace.add(20, 2.0)
    assert pace.units_per_s == pytest.approx(20.0, rel=0.05)


@given(st.lists(st.floats(0, 0.3), min_size=1, max_size=200))
def test_arrivals_are_counted_within_a_window(pauses):
    rate, now, times = ArrivalRate(), 0.0, []
    for pause in pauses:
        now += pause
        times.append(now)
        rate.add(now)
        seen = rate.per_s(now)
        assert seen <= sum(t > now - 2.0 for t in times)
    assert rate.per_s(now + 2.0) == 0.0


def test_a_steady_stream_has_its_rate():
    rate = ArrivalRate()
    for i in range(500):
        rate.add(i / 80)
    assert rate.per_s(500 / 80) == pytest.approx(80, rel=0.05)
