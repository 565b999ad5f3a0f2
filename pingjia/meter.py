"""Measure a piece of work: wall seconds and the peak memory of this process while it ran."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class Meter:
    """`with Meter() as meter: work()` and then `meter.seconds`, `meter.peak_bytes` (resident memory, not GPU memory).

    On Linux the kernel's high-water mark is reset at the start, so the peak is that of this piece of work alone; where
    that is not possible it is the peak of the whole process so far.
    """

    def __enter__(self) -> Meter:
        self._started = time.perf_counter()
        self._seconds: float | None = None
        _reset_peak()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._seconds = time.perf_counter() - self._started
        self._peak_bytes = peak_bytes()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started if self._seconds is None else self._seconds

    @property
    def peak_bytes(self) -> int:
        return peak_bytes() if self._seconds is None else self._peak_bytes


def peak_bytes() -> int:
    """Highest resident memory since the last reset (or since the start of the process), bytes."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak() -> None:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return
