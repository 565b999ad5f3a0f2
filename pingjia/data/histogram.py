"""Counting numbers into bins as they come: constant memory, exact counts, quantiles to within a bin."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


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
    def round(cls, high: int, num_bins: int) -> Histogram:
        """At most `num_bins` bins from 0 to `high` or a little more, of a width that reads well: 1, 2, 5, 10, 20 ..."""
        widths = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
        width = next(w for w in widths if w * num_bins >= high)
        return cls([float(width * i) for i in range(-(-high // width) + 1)])

    @property
    def num(self) -> int:
        return sum(self.counts)

    def add(self, values: Iterable[float] | np.ndarray) -> None:
        """Count the values."""
        array = np.asarray(list(values) if not isinstance(values, np.ndarray) else values, np.float64)
        if not len(array):
            return
        bins = np.clip(np.searchsorted(self.edges, array, "right") - 1, 0, len(self.counts) - 1)
        for index, count in zip(*np.unique(bins, return_counts=True), strict=True):
            self.counts[int(index)] += int(count)
        low, high = float(array.min()), float(array.max())
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)
        self.total += float(array.sum())

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
