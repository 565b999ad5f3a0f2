"""How many tokens a second a replica makes: measured at its start, corrected by what is observed. Pure.

An engine makes more tokens a second the more answers it works on, so what is observed under little load is no
capacity. It is compared with what the start measured for that load; the ratio, smoothed, corrects the capacity. All
replicas of a pool see the same mixture of questions, and only the ratio between them decides who gets what.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pingjia.types import EngineStats

# Seconds of computing after which an observation counts 63 %: a slow mean that is told, and a quick one that shows when
# the engine has become another one (throttled, a neighbour on its cores).
_SMOOTH_S, _QUICK_S = 6.0, 1.5
_JUMP = 0.15
_MIN_COMPUTE_S = 0.2  # less is too short to tell
_LOWEST, _HIGHEST = 0.01, 4.0  # a start measured on a busy machine may have been too low; a dead one is not for us


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens a second with `at_once` answers in work."""

    at_once: float
    tokens_per_s: float


class Speed:
    """The estimate of one replica. `measured`: at least one rate, by answers at once."""

    def __init__(self, measured: Sequence[Rate]) -> None:
        self.measured = sorted(measured, key=lambda rate: rate.at_once)
        self._ratio = self._quick = 1.0
        self._last: EngineStats | None = None

    @property
    def tokens_per_s(self) -> float:
        """What it makes when it has much to do."""
        return max(rate.tokens_per_s for rate in self.measured) * self._ratio

    def expected(self, at_once: float) -> float:
        """What the start says for so many answers: between its measurements a straight line, beyond them the last."""
        below = [rate for rate in self.measured if rate.at_once <= at_once]
        above = [rate for rate in self.measured if rate.at_once > at_once]
        if not below or not above:
            return (below[-1] if below else above[0]).tokens_per_s
        low, high = below[-1], above[0]
        part = (at_once - low.at_once) / (high.at_once - low.at_once)
        return low.tokens_per_s + part * (high.tokens_per_s - low.tokens_per_s)

    def observe(self, stats: EngineStats) -> None:
        """Take the engine's counters; what happened since the last call counts."""
        last, now = self._last, stats
        if last is None or now.compute_s_total < last.compute_s_total:
            self._last = now
            return
        compute_s = now.compute_s_total - last.compute_s_total
        tokens = now.generation_tokens_total - last.generation_tokens_total
        if compute_s < _MIN_COMPUTE_S or tokens <= 0:
            return
        self._last = now
        steps = now.num_steps - last.num_steps
        at_once = tokens / steps if steps > 0 else (now.num_running + last.num_running) / 2
        self._correct(tokens / compute_s / self.expected(max(1.0, at_once)), compute_s)

    def _correct(self, ratio: float, compute_s: float) -> None:
        ratio = min(_HIGHEST, max(_LOWEST, ratio))
        self._quick += (1.0 - math.exp(-compute_s / _QUICK_S)) * (ratio - self._quick)
        self._ratio += (1.0 - math.exp(-compute_s / _SMOOTH_S)) * (ratio - self._ratio)
        if abs(self._quick / self._ratio - 1.0) > _JUMP:
            self._ratio = self._quick


def is_news(published: int, weight: int, *, change: float = 0.05) -> bool:
    """Whether a new weight differs enough to tell: every change reloads balancers."""
    return abs(weight - published) > change * published
