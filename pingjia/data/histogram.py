"""Counting numbers into bins as they come: constant memory, exact counts, quantiles to within a bin."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

_MAX_BINS = 512


@dataclass(slots=True)
class Histogram:
    """`edges` of len(counts) + 1, ascending; bin i holds edges[i] <= x < edges[i + 1], the last one its upper edge too.

    What lies outside is counted in the first or last bin; `low` and `high` are the least and largest number met.
    """

    edges: list[float]
    counts: list[int] = field(default_factory=list)
    low: float | None = None
    high: float | None = None
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.edges) - 1)

    @classmethod
    def even(cls, low: float, high: float, num_bins: int) -> Histogram:
        """Bins of equal width."""
        return cls([round(low + (high - low) * i / num_bins, 9) for i in range(num_bins + 1)])

    @classmethod
    def whole(cls, limit: int) -> Histogram:
        """Bins for whole numbers from 1 to `limit`, of equal width and at most 512: by twos up to 1024."""
        width = max(1, -(-limit // _MAX_BINS))
        return cls([float(edge) for edge in range(1, max(limit, 1) + width + 1, width)])

    @property
    def num(self) -> int:
        return sum(self.counts)

    def add(self, values: Iterable[float] | np.ndarray) -> None:
        """Count the values. Raises ValueError for NaN, which lies in no bin."""
        array = np.asarray(list(values) if not isinstance(values, np.ndarray) else values, np.float64)
        if not len(array):
            return
        if np.isnan(array).any():
            raise ValueError(f"{int(np.isnan(array).sum())} of {len(array)} values are NaN")
        bins = np.clip(np.searchsorted(self.edges, array, "right") - 1, 0, len(self.counts) - 1)
        for index, count in zip(*np.unique(bins, return_counts=True), strict=True):
            self.counts[int(index)] += int(count)
        self._widen(float(array.min()), float(array.max()))
        self.total += float(array.sum())

    def merge(self, other: Histogram) -> None:
        """Count what another histogram counted, of the same edges: then it is as if all had been added here."""
        if other.edges != self.edges:
            raise ValueError(f"bins differ: {len(self.edges)} edges and {len(other.edges)}")
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        if other.low is not None and other.high is not None:
            self._widen(other.low, other.high)
        self.total += other.total

    def _widen(self, low: float, high: float) -> None:
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)

    def quantile(self, share: float) -> float | None:
        """The number below which `share` of all lie, to within a bin; None of none."""
        if not self.num or self.low is None or self.high is None:
            return None
        wanted, seen = share * self.num, 0
        for i, count in enumerate(self.counts):
            if count and seen + count >= wanted:
                part = (wanted - seen) / count
                value = self.edges[i] + part * (self.edges[i + 1] - self.edges[i])
                return min(max(value, self.low), self.high)
            seen += count
        return self.high

    def onto(self, edges: Sequence[float]) -> Histogram:
        """The same numbers between some of the edges only. Counts stay exact, because no bin is cut."""
        if cut := set(edges) - set(self.edges):
            raise ValueError(f"{len(cut)} of {len(edges)} edges would cut a bin")
        counts = [0] * (len(edges) - 1)
        for low, count in zip(self.edges, self.counts, strict=False):
            counts[min(max(bisect_right(edges, low) - 1, 0), len(counts) - 1)] += count
        return Histogram(list(edges), counts, self.low, self.high, self.total)

    def coarser(self, max_bins: int, mark: float | None = None) -> Histogram:
        """The same numbers in at most `max_bins` + 1 bins, for a picture: neighbours joined, empty ends left out.

        `mark` stays in the picture, and is an edge if it is one here.
        """
        met = [i for i, count in enumerate(self.counts) if count] or [0]
        if mark is not None:
            met.append(self._before(mark))
        first, last = min(met), max(met) + 1
        origin = 0 if mark is None else self._before(mark) + 1
        step = -(-(last - first) // max_bins)
        inner = range(first + (origin - first) % step, last, step)
        return self.onto([self.edges[i] for i in sorted({first, *inner, last})])

    def _before(self, value: float) -> int:
        """The bin that ends at a value, or that the value lies in."""
        return min(max(bisect_left(self.edges, value) - 1, 0), len(self.counts) - 1)
