"""Rows of earlier tasks between those of the new one: which, how many, when. A function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pingjia.tune.batches import BatchPlan
from pingjia.tune.phases import Phase

_REPLAY = 7  # keeps the draws of replayed rows apart from those of new ones


@dataclass(frozen=True, slots=True)
class ReplayPlan(BatchPlan):
    """Rows 0..num_new-1 are the new task's, the `num_old` after them those of earlier tasks.

    An epoch has every new row once and num_rows - num_new old ones, spread evenly between them; epoch after epoch goes
    on through the old rows, and only when all have been seen are they seen again.
    """

    num_new: int = 0
    num_old: int = 0

    def order(self, epoch: int) -> list[int]:
        new = BatchPlan.order(replace_rows(self, self.num_new), epoch)
        return _interleaved(new, [self.num_new + row for row in self._old(epoch)])

    def _old(self, epoch: int) -> list[int]:
        count = self.num_rows - self.num_new
        places = range(epoch * count, (epoch + 1) * count)
        rounds = {place // self.num_old: None for place in places}
        shuffled = {n: self._shuffled(n) for n in rounds}
        return [shuffled[place // self.num_old][place % self.num_old] for place in places]

    def _shuffled(self, number: int) -> list[int]:
        key = [self.seed, number, self.phase, _REPLAY]
        rows: list[int] = np.random.default_rng(key).permutation(self.num_old).tolist()
        return rows


def replace_rows(plan: BatchPlan, num_rows: int) -> BatchPlan:
    """The plain plan over so many rows."""
    return BatchPlan(num_rows, plan.rows_per_micro, plan.micros_per_update, plan.num_steps, plan.seed, plan.phase)


def num_replayed(num_new: int, num_old: int, ratio: float) -> int:
    """Old rows in an epoch: `ratio` for each new one; at least one where any are wanted and there are any."""
    return max(1, round(num_new * ratio)) if num_old and ratio else 0


def with_replay(phases: Sequence[Phase], num_new: int, num_old: int) -> list[Phase]:
    """The same phases with old rows in them. Their plans must count new and replayed rows already."""
    return [replace(phase, plan=_mixed(phase.plan, num_new, num_old)) for phase in phases]


def _mixed(plan: BatchPlan, num_new: int, num_old: int) -> BatchPlan:
    fields = (plan.num_rows, plan.rows_per_micro, plan.micros_per_update, plan.num_steps, plan.seed, plan.phase)
    return ReplayPlan(*fields, num_new, num_old)


def _interleaved(many: Sequence[int], few: Sequence[int]) -> list[int]:
    """Both in their own order, evenly mixed: every stretch has its share of each, to within one."""
    return [row for _, _, row in sorted([*_spaced(many, 0), *_spaced(few, 1)])]


def _spaced(rows: Sequence[int], kind: int) -> Iterator[tuple[float, int, int]]:
    return (((place + 0.5) / len(rows), kind, row) for place, row in enumerate(rows))
