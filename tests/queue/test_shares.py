"""Whose the machine's time was: the shares of all add up to the time in which anybody was served."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.queue.shares import Shares


class Clock:
    def __init__(self):
        self.now = Fraction(0)

    def __call__(self):
        return self.now


def test_alone_it_is_all_of_the_time():
    clock = Clock()
    shares = Shares(clock)
    clock.now = Fraction(5)
    entered = shares.enter(1)
    clock.now = Fraction(8)
    assert shares.leave(1, entered) == 3


def test_together_it_is_divided():
    clock = Clock()
    shares = Shares(clock)
    one = shares.enter(1)
    clock.now += 4
    three = shares.enter(3)
    clock.now += 4
    assert shares.leave(1, one) == pytest.approx(4 + 1)
    clock.now += 2
    assert shares.leave(3, three) == pytest.approx(3 + 2)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 4), st.booleans()), max_size=40))
def test_nothing_is_lost_and_nothing_counted_twice(steps):
    clock, busy, total = Clock(), Fraction(0), Fraction(0)
    shares = Shares(clock)
    inside = []

    def leave(index):
        num, entered = inside.pop(index)
        return Fraction(shares.leave(num, entered))

    for wait, num, goes in steps:
        busy += Fraction(wait) if any(n for n, _ in inside) else 0
        clock.now += wait
        if goes and inside:
            total += leave(0)
        else:
            inside.append((num, shares.enter(num)))
    while inside:
        total += leave(0)
    assert float(total) == pytest.approx(float(busy), abs=1e-6)
