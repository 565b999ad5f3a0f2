"""How long a step may take: never less than the setting, many times what was measured, generous while nothing was."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pingjia.worker.settings import WorkerSettings
from pingjia.worker.step_clock import StepClock

SETTINGS = WorkerSettings(frozen_after_s=2.0, unmeasured_s=120.0)


def test_before_anything_was_measured_a_step_may_take_long():
    clock = StepClock(SETTINGS)
    assert clock.limit_s(0) == clock.limit_s(500) == 120.0
    clock.add(largest=1, total=4, seconds=0.01)
    assert clock.limit_s(0) == 2.0
    assert clock.limit_s(10) == 120.0, "prompts were not measured yet"


def test_a_long_prompt_and_a_slow_network_get_their_time():
    clock = StepClock(SETTINGS)
    clock.add(largest=200, total=200, seconds=10.0)
    clock.add(largest=1, total=1, seconds=0.3)
    assert clock.limit_s(0) == 20 * 0.3
    assert clock.limit_s(2000) == 20 * (0.3 + 2000 * 0.05)


def test_a_step_without_work_tells_nothing():
    clock = StepClock(SETTINGS)
    clock.add(largest=0, total=0, seconds=0.0)
    assert clock.limit_s(0) == 120.0


steps = st.lists(st.tuples(st.integers(1, 500), st.integers(0, 500), st.floats(0.0, 100.0)), max_size=30)


@given(steps, st.integers(0, 10_000))
def test_never_less_than_the_setting_nor_than_a_step_that_was_usual(taken, num_prompt):
    clock = StepClock(SETTINGS)
    for largest, more, seconds in taken:
        clock.add(largest, largest + more, seconds)
    assert clock.limit_s(num_prompt) >= 2.0
    assert clock.limit_s(num_prompt + 1) >= clock.limit_s(num_prompt) or num_prompt == 0
    decoding = [seconds for largest, _, seconds in taken if largest < 16]
    if decoding:
        assert clock.limit_s(0) >= min(decoding)
