"""How many answers may be in work at once, and when a refused client should come back. Pure: no clock, no sockets."""

from __future__ import annotations

from pingjia.errors import Overloaded

_SMOOTHING = 0.1
_MAX_RETRY_S = 60.0  # OpenAI's client ignores a longer Retry-After


class Admission:
    """Counts slots; one answer (one choice) takes one.

    A refused client is given the time at which, at the measured pace, its turn would come: each refusal takes a place
    in a line that is only imagined, and every finished answer moves that line on. So clients do not all come back in
    the same second.
    """

    def __init__(self, max_concurrent: int) -> None:
        self.max_concurrent = max_concurrent
        self.in_work = 0
        self.mean_s: float | None = None  # measured seconds per answer; None until one has ended
        self._refused = 0

    def take(self, num: int) -> None:
        """Take `num` slots or raise Overloaded."""
        if self.in_work + num > self.max_concurrent:
            self._refused += num
            raise Overloaded(
                f"{self.in_work} answers are in work and the limit is {self.max_concurrent}; "
                f"come back in {self.retry_after_s:.0f} s",
                retry_after_s=self.retry_after_s,
            )
        self.in_work += num

    def give(self, num: int) -> None:
        """Return `num` slots."""
        self.in_work -= num
        self._refused = max(0, self._refused - num)

    def measure(self, seconds: float) -> None:
        """Take note of how long one answer held its slot."""
        self.mean_s = seconds if self.mean_s is None else self.mean_s + _SMOOTHING * (seconds - self.mean_s)

    @property
    def retry_after_s(self) -> float:
        """Seconds until the line of refused clients is through; 1 before anything was measured."""
        if self.mean_s is None:
            return 1.0
        return min(_MAX_RETRY_S, max(1.0, self._refused * self.mean_s / self.max_concurrent))
