"""Whose time the machine's time was: every second is divided among the requests in work. Pure; handed a clock.

A request's share is what its key pays for (`cost/spending.py`): eight requests that run for ten seconds together have
shares of ten seconds in all, not eighty.
"""

from __future__ import annotations

from collections.abc import Callable


class Shares:
    """Processor-sharing accounts: one sum is carried on, and a request's share is how far it grew meanwhile."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at = clock()
        self._num = 0
        self._per_answer_s = 0.0

    def enter(self, num: int) -> float:
        """`num` answers begin. Keep the result for `leave`."""
        self._advance()
        self._num += num
        return self._per_answer_s

    def leave(self, num: int, entered: float) -> float:
        """They end; return their seconds."""
        self._advance()
        self._num -= num
        return num * (self._per_answer_s - entered)

    def since(self, entered: float) -> float:
        """Seconds of one answer so far."""
        self._advance()
        return self._per_answer_s - entered

    def _advance(self) -> None:
        now = self._clock()
        if self._num > 0:
            self._per_answer_s += max(0.0, now - self._at) / self._num
        self._at = now
