"""Limits per minute: what is counted, for how long one waits, and what happens while Redis is away."""

from __future__ import annotations

import asyncio
import signal
import time
from math import floor, inf

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pingjia.gateway.rate_limits import RETRY_S, WINDOW_S, RateLimits, Window


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def limits_over(url, clock=time.monotonic, share=0.5):
    return RateLimits(url, local_share=share, clock=clock)


# ---- arithmetic


def later(window, seconds):
    """The same window after some seconds in which nothing came."""
    previous, left, current = window.previous, window.previous_left_s, window.current
    if seconds >= window.current_left_s:
        previous, left, current = current, WINDOW_S - (seconds - window.current_left_s), 0
        return Window(previous, max(0.0, left), current, WINDOW_S)
    return Window(previous, max(0.0, left - seconds), current, window.current_left_s - seconds)


windows = st.builds(
    lambda p, c, left: Window(p, left, c, left),
    st.integers(0, 500), st.integers(0, 500), st.floats(0.01, WINDOW_S),
)  # fmt: skip


@given(windows, st.integers(1, 600), st.integers(1, 600))
def test_after_the_wait_it_fits_and_a_second_before_it_does_not(window, limit, cost):
    wait = window.wait_s(limit, cost)
    if cost > limit:
        assert wait == inf
        return
    assert 0 <= wait <= 2 * WINDOW_S
    assert floor(later(window, wait).used) + cost <= limit
    assume(wait > 1)
    assert floor(later(window, wait - 1).used) + cost > limit


@given(windows)
def test_reset_is_when_nothing_weighs(window):
    assert later(window, window.empty_in_s + 0.001).used < 1


# ---- in the process


async def test_no_more_than_the_limit_passes():
    limits = limits_over(None)
    outcomes = [await limits.take("a", 3, 1) for _ in range(5)]
    assert [o.ok for o in outcomes] == [True] * 3 + [False] * 2
    assert [o.remaining for o in outcomes] == [2, 1, 0, 0, 0]
    assert 0 < outcomes[-1].wait_s <= 2 * WINDOW_S


async def test_names_do_not_share():
    limits = limits_over(None)
    assert (await limits.take("a", 1, 1)).ok
    assert (await limits.take("b", 1, 1)).ok
    assert not (await limits.take("a", 1, 1)).ok


async def test_what_was_not_used_is_given_back():
    limits = limits_over(None)
    await limits.take("a", 100, 100)
    await limits.give_back("a", 60)
    assert not (await limits.take("a", 100, 61)).ok
    assert (await limits.take("a", 100, 60)).ok


async def test_giving_back_more_than_was_taken_is_no_credit():
    limits = limits_over(None)
    await limits.take("a", 100, 10)
    await limits.give_back("a", 5000)
    assert not (await limits.take("a", 100, 101)).ok
    assert (await limits.take("a", 100, 100)).ok
    assert not (await limits.take("a", 100, 1)).ok


async def test_giving_back_after_a_limit_was_passed_works_too():
    limits = limits_over(None)
    await limits.take("a", 1000, 1000)
    await limits.give_back("a", 1000)
    assert (await limits.take("a", 1000, 1000)).ok


async def test_a_changed_limit_goes_on_from_what_was_counted():
    limits = limits_over(None)
    for _ in range(5):
        await limits.take("a", 5, 1)
    assert not (await limits.take("a", 5, 1)).ok
    assert (await limits.take("a", 6, 1)).ok
    assert not (await limits.take("a", 4, 1)).ok


async def test_many_at_once_pass_no_more_than_the_limit():
    limits = limits_over(None)
    outcomes = await asyncio.gather(*(limits.take("a", 10, 1) for _ in range(100)))
    assert sum(o.ok for o in outcomes) == 10


# ---- over Redis


async def test_two_gateways_share_one_limit(redis):
    one, two = limits_over(redis.url), limits_over(redis.url)
    outcomes = await asyncio.gather(*(limits.take("a", 10, 1) for limits in (one, two) for _ in range(20)))
    assert sum(o.ok for o in outcomes) == 10
    refused = await two.take("a", 10, 1)
    assert refused.remaining == 0
    assert 0 < refused.wait_s <= 2 * WINDOW_S
    await one.give_back("a", 4)
    assert (await two.take("a", 10, 4)).ok
    assert not (await two.take("a", 10, 1)).ok
    for limits in (one, two):
        await limits.close()


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_without_redis_a_share_is_allowed_and_it_comes_back_by_itself(redis, how, caplog):
    clock = Clock()
    limits = limits_over(redis.url, clock)
    assert (await limits.take("a", 10, 1)).limit == 10
    if how == "killed":
        redis.stop()
    else:
        redis.signal(signal.SIGSTOP)
    outcomes = [await limits.take("a", 10, 1) for _ in range(12)]
    assert [o.ok for o in outcomes] == [True] * 5 + [False] * 7  # half of ten: neither all nor nothing
    assert limits.is_lost
    assert "50%" in caplog.text
    clock.now += RETRY_S
    assert not (await limits.take("a", 10, 1)).ok  # asked again, and still away
    if how == "killed":
        redis.start()
    else:
        redis.signal(signal.SIGCONT)
    clock.now += RETRY_S
    assert (await limits.take("a", 10, 1)).limit == 10
    assert not limits.is_lost
    assert "is back" in caplog.text
    assert caplog.text.count("cannot be reached") == 1
    await limits.close()


async def test_while_it_is_away_nobody_waits_for_it(redis):
    limits = limits_over(redis.url)
    redis.signal(signal.SIGSTOP)
    await limits.take("a", 10_000, 1)  # finds out, and waits for it
    started = time.perf_counter()
    await asyncio.gather(*(limits.take("a", 10_000, 1) for _ in range(200)))
    assert limits.is_lost
    assert time.perf_counter() - started < 5  # 200 waits in a row would be 100 s
    redis.signal(signal.SIGCONT)
    await limits.close()


async def test_a_small_limit_still_lets_one_in_while_it_is_away():
    limits = limits_over("redis://127.0.0.1:1/0")
    assert (await limits.take("a", 1, 1)).ok
    assert not (await limits.take("a", 1, 1)).ok
    await limits.close()


async def test_giving_back_while_it_is_away_harms_nothing():
    limits = limits_over("redis://127.0.0.1:1/0")
    await limits.give_back("a", 10)
    assert limits.is_lost
    await limits.close()
