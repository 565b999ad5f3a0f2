"""Which rows say, word for word, what an earlier one says: 16 bytes a row, whatever is in them.

Not here: rows that differ in case or spacing, or nearly say the same (`duplicates.py`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pingjia.types import Example

_LINE_BITS = 40  # of a place; the rest is the number of the file


@dataclass(frozen=True, slots=True)
class Repeat:
    """The row `where` says what the row `first` says; both are "file:line"."""

    where: str
    first: str


class Seen:
    """Remembers rows. Two different ones are taken for equal once in 370,000 runs over ten million rows."""

    def __init__(self) -> None:
        self._digests = array("Q")
        self._places = array("Q")
        self._files: dict[str, int] = {}

    def add(self, example: Example) -> None:
        turns = "\0".join([f"{m.role}\0{m.text}" for m in example.messages])
        digest = hashlib.blake2b(turns.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        file, _, line = example.where.rpartition(":")
        number = self._files.setdefault(file, len(self._files))
        self._digests.append(int.from_bytes(digest, "little"))
        self._places.append(number << _LINE_BITS | int(line))

    def repeats(self) -> Iterator[Repeat]:
        """In the order in which rows were added. Takes another 17 bytes a row while it sorts."""
        digests = np.frombuffer(self._digests, np.uint64) if self._digests else np.zeros(0, np.uint64)
        order = np.argsort(digests, kind="stable")
        ordered = digests[order]
        is_same = ordered[1:] == ordered[:-1]
        later = np.flatnonzero(is_same) + 1
        starts = np.flatnonzero(np.concatenate(([True], ~is_same)))
        firsts = order[starts[np.searchsorted(starts, later, side="right") - 1]]
        files = list(self._files)
        for row, first in sorted(zip(order[later].tolist(), firsts.tolist(), strict=True)):
            yield Repeat(self._where(row, files), self._where(first, files))

    def _where(self, row: int, files: list[str]) -> str:
        place = self._places[row]
        return f"{files[place >> _LINE_BITS]}:{place & ((1 << _LINE_BITS) - 1)}"
