"""From counters to tokens a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.cluster.calibration import calibrate
from pingjia.cluster.replica import weight_of
from pingjia.cluster.speed import Rate, Speed, is_news
from pingjia.errors import EngineError
from pingjia.types import Chunk, EngineStats, Request

START = [Rate(1, 10.0), Rate(8, 40.0)]


def stats(tokens: int, steps: int, compute_s: float) -> EngineStats:
    return EngineStats(generation_tokens_total=tokens, num_steps=steps, compute_s_total=compute_s)


def observed(speed: Speed, rate: float, at_once: int, seconds: float) -> None:
    tokens = steps = 0
    compute_s = 0.0
    speed.observe(stats(0, 0, 0.0))
    while compute_s < seconds:
        compute_s, steps, tokens = compute_s + at_once / rate, steps + 1, tokens + at_once
        speed.observe(stats(tokens, steps, compute_s))


def test_between_what_was_measured_a_straight_line():
    speed = Speed(START)
    assert [speed.expected(n) for n in (0.5, 1, 4.5, 8, 30)] == [10, 10, 25, 40, 40]
    assert speed.tokens_per_s == 40


@given(at_once=st.integers(1, 8))
def test_little_load_is_no_slowness(at_once):
    """An engine that is as fast as at its start, seen with one answer at once, keeps its weight."""
    speed = Speed(START)
    observed(speed, speed.expected(at_once), at_once, 60.0)
    assert speed.tokens_per_s == pytest.approx(40, rel=1e-6)


@given(at_once=st.integers(1, 8), factor=st.floats(0.1, 2.0))
def test_what_is_slower_under_any_load_is_slower(at_once, factor):
    speed = Speed(START)
    observed(speed, factor * speed.expected(at_once), at_once, 60.0)
    assert speed.tokens_per_s == pytest.approx(40 * factor, rel=0.01)


def test_idling_and_a_new_engine_tell_nothing():
    speed = Speed(START)
    observed(speed, 5.0, 1, 30.0)
    low = speed.tokens_per_s
    assert low < 21
    for _ in range(100):
        speed.observe(stats(150, 150, 30.0))
    assert speed.tokens_per_s == low
    speed.observe(stats(0, 0, 0.0))  # counters began anew
    assert speed.tokens_per_s == low


def test_weights_are_never_zero_and_small_changes_no_news():
    assert [weight_of(rate) for rate in (0.0, 0.01, 5.04, 1e9)] == [1, 1, 50, 65_535]
    assert not is_news(100, 105)
    assert is_news(100, 106)
    assert is_news(100, 94)


class Clockwork:
    """Tokens every so many seconds, whatever is asked."""

    def __init__(self, token_s: float, num: int = 10_000) -> None:
        self.token_s, self.num, self.running = token_s, num, 0

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        self.running += 1
        try:
            for _ in range(min(self.num, request.sampling.max_tokens)):
                await asyncio.sleep(self.token_s)
                yield Chunk("x", (5,))
            yield Chunk("", finish_reason="length")
        finally:
            self.running -= 1


async def test_the_start_measures_with_one_and_with_several():
    backend = Clockwork(0.004)
    rates = await calibrate(backend, [1, 2], seats=4, max_s=0.3)
    assert [rate.at_once for rate in rates] == [1, 4]
    assert 2 < rates[1].tokens_per_s / rates[0].tokens_per_s < 6
    assert backend.running == 0


async def test_a_model_that_says_nothing_is_not_ready():
    with pytest.raises(EngineError, match="no token"):
        await calibrate(Clockwork(0.0, num=0), [1], seats=1, max_s=0.1)
