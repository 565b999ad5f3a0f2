"""Histograms: exact counts, whatever the pieces they were counted in and the bins they are drawn in."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data.histogram import Histogram

LENGTHS = st.lists(st.integers(1, 3000), max_size=80)
LIMITS = st.integers(1, 3000)


def counted(numbers: list[int], limit: int) -> Histogram:
    h = Histogram.whole(limit)
    h.add(numbers)
    return h


@given(LENGTHS, LENGTHS, LIMITS)
def test_pieces_and_merged_parts_equal_the_whole(left: list[int], right: list[int], limit: int) -> None:
    whole, pieces, merged = counted([*left, *right], limit), counted(left, limit), counted(left, limit)
    pieces.add(np.array(right))
    merged.merge(counted(right, limit))
    assert whole == pieces == merged
    assert whole.num == len(left) + len(right)
    assert whole.total == sum(left) + sum(right)


@given(LENGTHS, LIMITS)
def test_every_number_is_in_its_bin(numbers: list[int], limit: int) -> None:
    numbers = [n for n in numbers if n <= limit]
    h = counted(numbers, limit)
    for i, count in enumerate(h.counts):
        assert count == sum(h.edges[i] <= n < h.edges[i + 1] for n in numbers)


@given(st.integers(1, 10**7))
def test_bins_of_whole_numbers_are_equal_few_and_reach_the_limit(limit: int) -> None:
    h = Histogram.whole(limit)
    widths = {b - a for a, b in zip(h.edges, h.edges[1:], strict=False)}
    assert len(widths) == 1
    assert len(h.counts) <= 513
    assert h.edges[0] == 1
    assert h.edges[-1] > limit
    assert widths == {1.0} or limit > 512


@given(st.lists(st.integers(1, 999), min_size=1, max_size=80), st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_a_quantile_is_right_to_within_a_bin(numbers: list[int], share: float) -> None:
    h = counted(numbers, 1000)
    exact = sorted(numbers)[max(0, math.ceil(share * len(numbers)) - 1)]
    found = h.quantile(share)
    assert found is not None
    assert abs(found - exact) <= h.edges[1] - h.edges[0]


@given(LENGTHS, LIMITS, st.integers(1, 60), st.none() | st.integers(1, 3000))
def test_a_coarser_picture_counts_the_same(numbers: list[int], limit: int, max_bins: int, mark: int | None) -> None:
    h = counted(numbers, limit)
    coarse = h.coarser(max_bins, mark)
    assert len(coarse.counts) <= max_bins + 1
    assert set(coarse.edges) <= set(h.edges)
    assert (coarse.num, coarse.total, coarse.low, coarse.high) == (h.num, h.total, h.low, h.high)
    for i, count in enumerate(coarse.counts):
        low, high = coarse.edges[i], coarse.edges[i + 1]
        assert count == sum(c for edge, c in zip(h.edges, h.counts, strict=False) if low <= edge < high)


@given(st.lists(st.floats(0, 1), max_size=40), st.integers(1, 99), st.integers(1, 60))
def test_a_threshold_that_is_an_edge_stays_one(scores: list[float], percent: int, max_bins: int) -> None:
    h = Histogram.even(0, 1, 100)
    h.add(scores)
    assert percent / 100 in h.coarser(max_bins, percent / 100).edges


def test_what_lies_outside_is_counted_at_the_ends() -> None:
    h = Histogram.even(0, 1, 4)
    h.add([-1, 0.3, 1.0, 7])
    assert h.counts == [1, 1, 0, 2]
    assert (h.low, h.high) == (-1, 7)
    assert Histogram.even(0, 1, 4).quantile(0.5) is None


def test_what_cannot_be_counted_is_refused() -> None:
    h = Histogram.even(0, 1, 4)
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        h.add([0.5, math.nan])
    with pytest.raises(ValueError, match="bins differ: 5 edges and 9"):
        h.merge(Histogram.even(0, 1, 8))
    with pytest.raises(ValueError, match="1 of 2 edges would cut a bin"):
        h.onto([0.0, 0.3])
    assert h.num == 0
