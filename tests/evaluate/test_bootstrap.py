"""Intervals: right width, seeded, and honest about what they cannot know."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.evaluate import bootstrap
from pingjia.evaluate.bootstrap import mean_interval


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_interval_holds_the_mean_and_stays_within_the_values(values: list[float]) -> None:
    mean, low, high = mean_interval(values)
    assert min(values) - 1e-9 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= max(values) + 1e-9
    assert mean_interval(values) == (mean, low, high)


def test_width_agrees_with_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.1, size=400)
    _, low, high = mean_interval(list(values))
    expected = 2 * 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert high - low == pytest.approx(expected, rel=0.1)


def test_share_of_covered_means_is_near_the_confidence() -> None:
    rng = np.random.default_rng(2)
    covered = [low <= 0.3 <= high for _, low, high in (mean_interval(rng.binomial(1, 0.3, 60)) for _ in range(120))]
    assert 0.88 <= np.mean(covered) <= 1.0


def test_equal_values_have_an_interval_without_width() -> None:
    assert mean_interval([1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)
    assert mean_interval([0.25]) == (0.25, 0.25, 0.25)


def test_many_values_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(np.linspace(0, 1, 500))
    whole = mean_interval(values)
    monkeypatch.setattr(bootstrap, "_BLOCK", 1000)
    assert mean_interval(values) == pytest.approx(whole, abs=0.01)


def test_no_values_is_our_own_bug() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
