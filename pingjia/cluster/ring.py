"""Consistent hashing with bounded loads (arXiv:1608.01350), weighted: keys -> replicas. Pure.

A key goes to the first replica clockwise that has room. Room is `spread` times the fair share of all that is in work:
a popular key spills over to the next replicas instead of drowning one, and a replica that comes or goes moves only
its own keys.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b

_SLACK = 2  # with few answers in work, chance alone goes beyond any fair share; one or two more hurt nobody
_POINTS = 64  # of a replica with the mean weight; the largest share is then some 25 % above the mean


def position(data: bytes) -> int:
    """Where something lies on the ring."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


class BoundedRing:
    """A ring for one set of replicas. `weights`: name -> speed beside the others, above 0."""

    def __init__(self, weights: Mapping[str, float], *, spread: float = 1.25, points: int = _POINTS) -> None:
        if spread <= 1.0:
            raise ValueError(f"spread {spread}: a replica must be allowed more than its fair share")
        self.num_points = self.points_of(weights, points)
        self._weights = dict(weights)
        self._total_weight = sum(weights.values())
        self._spread = spread
        places = sorted(
            (position(f"{name}#{i}".encode()), name) for name, num in self.num_points.items() for i in range(num)
        )
        self._positions = [place for place, _ in places]
        self._names = [name for _, name in places]

    @staticmethod
    def points_of(weights: Mapping[str, float], points: int = _POINTS) -> dict[str, int]:
        """How many points each gets: in proportion to its weight."""
        mean = sum(weights.values()) / max(1, len(weights))
        return {name: max(1, round(points * weight / mean)) for name, weight in weights.items()}

    def room(self, name: str, num_in_work: int) -> int:
        """How many answers a replica may have when there are `num_in_work` in all, the new one not counted."""
        share = self._weights[name] / self._total_weight
        return math.ceil(self._spread * (num_in_work + 1) * share) + _SLACK

    def pick(self, key: bytes, load_of: Callable[[str], int], num_in_work: int) -> str:
        """The replica for a key. There always is one with room: not all can have more than their share."""
        for name in self._clockwise(key):
            if load_of(name) < self.room(name, num_in_work):
                return name
        raise AssertionError("no replica has room: the loads do not add up to num_in_work")

    def _clockwise(self, key: bytes) -> Iterator[str]:
        seen: set[str] = set()
        start = bisect_left(self._positions, position(key))
        for i in range(len(self._names)):
            name = self._names[(start + i) % len(self._names)]
            if name not in seen:
                seen.add(name)
                yield name
