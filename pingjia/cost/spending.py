"""What each key has spent this month: the requests of a ledger, priced one by one. Follows the file as it grows.

A bill (`bill.py`) shares out what a machine cost, idle time included. A budget cannot: it must hold before the month is
over. So a request costs its own share of the machine while it ran (`note.share_s`, which its gateway notes: seconds
divided among the requests in work), or all of its seconds where no share was noted.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

from pingjia.cost.prices import Prices, exact
from pingjia.cost.stages import is_cache_hit, is_request
from pingjia.ledger import Fact


def price_of(fact: Fact, prices: Prices) -> Fraction:
    """What one request cost; nothing for a cached answer. Raises nothing: a measure that is none counts as 0."""
    if is_cache_hit(fact):
        return Fraction(0)
    seconds = _number(fact.note.get("share_s", fact.seconds))
    energy_wh = _number(fact.energy_wh) or seconds * (prices.power_w or 0) / 3600
    return seconds * prices.per_hour / 3600 + energy_wh * prices.per_kwh / 1000


@dataclasses.dataclass(slots=True)
class Spent:
    """What one key did in one month."""

    cost: Fraction = Fraction(0)
    num_requests: int = 0
    num_cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, fact: Fact, prices: Prices) -> None:
        self.cost += price_of(fact, prices)
        self.num_requests += 1
        self.num_cache_hits += is_cache_hit(fact)
        self.prompt_tokens += int(_number(fact.prompt_tokens))
        self.completion_tokens += int(_number(fact.completion_tokens))


class Spending:
    """This month's requests of a ledger by key. Months begin at midnight UTC, as the ledger's times are."""

    def __init__(
        self, path: str | os.PathLike[str], prices: Prices, *, now: Callable[[], datetime] | None = None
    ) -> None:
        self.path = Path(path)
        self.prices = prices
        self._now = now or (lambda: datetime.now(UTC))
        self._forget("")

    def of(self, who: str) -> Spent:
        """What the key of that id has spent so far this month, other processes' requests included."""
        self._catch_up()
        return self._spent[who] if who in self._spent else Spent()

    def everyone(self) -> dict[str, Spent]:
        """The same for all keys that asked anything."""
        self._catch_up()
        return dict(self._spent)

    def _forget(self, month: str) -> None:
        self._month, self._place, self._inode = month, 0, 0
        self._spent: dict[str, Spent] = defaultdict(Spent)

    def _catch_up(self) -> None:
        month = f"{self._now():%Y-%m}"
        try:
            stat = self.path.stat()
        except OSError:
            # No ledger yet, or it was moved away: what was counted this month stays counted.
            if month != self._month:
                self._forget(month)
            return
        if month != self._month or stat.st_size < self._place:
            self._forget(month)
        if (stat.st_ino, stat.st_size) != (self._inode, self._place):
            self._place = 0 if self._inode not in (0, stat.st_ino) else self._place
            self._inode = stat.st_ino
            self._read()

    def _read(self) -> None:
        with open(self.path, "rb") as file:
            file.seek(self._place)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # its end is still to come
                self._place += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        if b'request"' not in line or self._month.encode() not in line:
            return  # most lines, once a ledger is old: not worth parsing
        fact = _fact(line)
        if fact is not None and is_request(fact) and fact.at.startswith(self._month):
            self._spent[fact.who].add(fact, self.prices)


_NAMES = {f.name for f in dataclasses.fields(Fact)}


def _fact(line: bytes) -> Fact | None:
    try:
        row: dict[str, Any] = json.loads(line)
        fact = Fact(**{name: value for name, value in row.items() if name in _NAMES})
    except (ValueError, TypeError, AttributeError):
        return None
    well = isinstance(fact.note, dict) and all(isinstance(t, str) for t in (fact.kind, fact.at, fact.who))
    return fact if well else None


def _number(value: Any) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        return Fraction(0)
    return exact(value)
