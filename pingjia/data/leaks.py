"""Training rows that held-out rows give away: a model that has seen the exam proves nothing by passing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pingjia.data.columns import Column, chunks
from pingjia.data.duplicates import Signatures, joined, verified

SAME_ROW, SAME_QUESTION, NEARLY = 1, 2, 3


def find_leaks(rows: Signatures, held_out: Signatures, near: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [N] held-out row or -1, [N] how: one of the constants above, or 0) for every training row.

    A training row leaks when it equals a held-out row, asks a held-out question, or (with `near`) nearly equals one.
    Memory: the keys of the held-out rows, a column at a time, and 5 bytes a training row.
    """
    leaks = _Leaks(np.full(len(rows), -1, np.int32), np.zeros(len(rows), np.uint8))
    if not len(held_out):
        return leaks.where, leaks.how
    _look_up(leaks, SAME_ROW, rows.exact, joined(held_out.exact[:]), joined)
    _look_up(leaks, SAME_QUESTION, rows.question, held_out.question[:])
    if near is not None:
        for mine, theirs in zip(rows.bands, held_out.bands, strict=True):
            for chunk in chunks(len(rows)):
                numbers = np.arange(chunk.start, chunk.stop, dtype=np.int32)
                found = _near_in(rows, held_out, numbers, mine[chunk], theirs[:], near)
                leaks.note(chunk, NEARLY, found)
    return leaks.where, leaks.how


@dataclass(frozen=True, slots=True)
class _Leaks:
    where: np.ndarray
    how: np.ndarray

    def note(self, chunk: slice, kind: int, found: np.ndarray) -> None:
        where, how = self.where[chunk], self.how[chunk]
        new = (where == -1) & (found >= 0)
        where[new], how[new] = found[new], kind


def _look_up(
    leaks: _Leaks,
    kind: int,
    mine: Column,
    theirs: np.ndarray,
    as_keys: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> None:
    """For every key of `mine` the first place in `theirs` that equals it."""
    order = np.argsort(theirs, kind="stable")
    theirs = theirs[order]
    for chunk in chunks(len(mine)):
        keys = as_keys(mine[chunk])
        at = np.minimum(np.searchsorted(theirs, keys), len(theirs) - 1)
        leaks.note(chunk, kind, np.where(theirs[at] == keys, order[at], -1))


def _near_in(
    rows: Signatures, held_out: Signatures, numbers: np.ndarray, mine_N: np.ndarray, theirs_M: np.ndarray, near: float
) -> np.ndarray:
    """For rows of these `numbers` a held-out row of the same bucket that is near; every one of the bucket is tried."""
    result = np.full(len(mine_N), -1, np.int64)
    order = np.argsort(theirs_M, kind="stable")
    theirs_M = theirs_M[order]
    at = np.searchsorted(theirs_M, mine_N)
    left = np.flatnonzero(theirs_M[np.minimum(at, len(theirs_M) - 1)] == mine_N)
    at, end = at[left], np.searchsorted(theirs_M, mine_N[left], "right")
    while len(left):
        found, candidates = verified(rows, numbers[left], held_out, order[at], near)
        result[found - numbers[0]] = candidates
        is_open = (result[left] == -1) & (at + 1 < end)
        left, at, end = left[is_open], at[is_open] + 1, end[is_open]
    return result
