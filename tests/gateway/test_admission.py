"""The arithmetic of slots and of when to come back."""

from __future__ import annotations

import pytest

from pingjia.errors import Overloaded
from pingjia.gateway.admission import Admission


def refusal(admission: Admission, num: int = 1) -> float:
    with pytest.raises(Overloaded) as e:
        admission.take(num)
    return e.value.retry_after_s


def test_slots_are_counted():
    admission = Admission(3)
    admission.take(2)
    refusal(admission, 2)
    admission.take(1)
    assert admission.in_work == 3
    admission.give(3)
    admission.take(3)


def test_before_anything_was_measured_it_is_a_second():
    admission = Admission(1)
    admission.take(1)
    assert refusal(admission) == 1.0


def test_each_refused_client_is_sent_further_back_at_the_measured_pace():
    admission = Admission(2)
    admission.measure(10.0)
    admission.take(2)  # two slots, 10 s each: one comes free every 5 s
    assert [refusal(admission) for _ in range(3)] == [5.0, 10.0, 15.0]
    admission.give(1)  # one of the line may come in
    admission.take(1)
    assert refusal(admission) == 15.0


def test_no_client_is_sent_away_for_longer_than_a_minute():
    admission = Admission(1)
    admission.measure(100.0)
    admission.take(1)
    assert refusal(admission) == 60.0


def test_the_mean_follows_what_is_measured():
    admission = Admission(1)
    for _ in range(100):
        admission.measure(2.0)
    for _ in range(100):
        admission.measure(8.0)
    assert admission.mean_s == pytest.approx(8.0, rel=0.01)
