"""How sure a mean is: percentile bootstrap intervals. Knows numbers only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
SEED = 20231
CONFIDENCE = 0.95
_BLOCK = 1_000_000  # drawn indices held at a time (8 MB)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of `values` and the ends of its 95 % interval; the same values give the same interval.

    Resamples whole questions with replacement. Where every value is equal the interval has no width: that says
    nothing new was seen in resampling, not that the mean is certain. Raises ValueError without values.
    """
    if not len(values):
        raise ValueError("no values to average")
    data = np.asarray(values, dtype=np.float64)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(_resampled_means(data), [tail, 1 - tail])
    return float(data.mean()), float(low), float(high)


def _resampled_means(data: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(SEED)
    rows = max(1, _BLOCK // len(data))
    means: list[np.ndarray] = []
    for start in range(0, RESAMPLES, rows):
        shape = (min(rows, RESAMPLES - start), len(data))
        means.append(data[rng.integers(len(data), size=shape)].mean(axis=1))
    return np.concatenate(means)
