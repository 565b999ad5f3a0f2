"""Which rows make up which update. Pure: order is a function of (seed, epoch), so a resumed run finds its place.

Knows row numbers only; `step.py` turns rows into tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MAX_TOKENS_ON_CPU = 1024
"""Of a micro-batch in one process on a CPU, if its rows can be shared out so. Longer ones measured no faster there
(SmolLM2 in float32: 640, 1024 and 2700 tokens within 4 % of each other), and keep more."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """`rows_per_update` rows an update, in micro-batches of `rows_per_micro`; the last of an epoch may be short."""

    num_rows: int
    rows_per_micro: int
    micros_per_update: int
    num_steps: int
    seed: int
    phase: int = 0

    @classmethod
    def of(
        cls,
        num_rows: int,
        *,
        rows_per_micro: int,
        micros_per_update: int,
        num_epochs: float,
        max_steps: int | None,
        seed: int,
        phase: int = 0,
    ) -> BatchPlan:
        per_epoch = math.ceil(num_rows / (rows_per_micro * micros_per_update))
        num_steps = max_steps or max(1, math.ceil(per_epoch * num_epochs))
        return cls(num_rows, rows_per_micro, micros_per_update, num_steps, seed, phase)

    @property
    def rows_per_update(self) -> int:
        return self.rows_per_micro * self.micros_per_update

    @property
    def updates_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.rows_per_update)

    def order(self, epoch: int) -> list[int]:
        """The rows of one epoch, shuffled. Every row once."""
        key = [self.seed, epoch] if self.phase == 0 else [self.seed, epoch, self.phase]
        return np.random.default_rng(key).permutation(self.num_rows).tolist()

    def updates(self, start: int = 0) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield (step, micro-batches of row numbers) for steps start..num_steps-1."""
        epoch, order = -1, []
        for step in range(start, self.num_steps):
            if step // self.updates_per_epoch != epoch:
                epoch = step // self.updates_per_epoch
                order = self.order(epoch)
            first = step % self.updates_per_epoch * self.rows_per_update
            rows = order[first : first + self.rows_per_update]
            yield step, [rows[i : i + self.rows_per_micro] for i in range(0, len(rows), self.rows_per_micro)]


def share_out(
    rows: Sequence[int],
    lengths: Sequence[int],
    rows_per_micro: int,
    num_processes: int = 1,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """The rows of one update as micro-batches of at most `rows_per_micro`, about equally long in tokens.

    lengths[row]: its tokens. As few micro-batches as there can be, or so many that they have `max_tokens` on average;
    inside each the order of the update. The longest row goes first, each to where there are fewest tokens: the longest
    micro-batch decides how much memory a run needs. With several processes their number divides that of the
    micro-batches, and some of them may be empty.
    """
    count = math.ceil(len(rows) / rows_per_micro)
    if max_tokens is not None:
        count = max(count, min(len(rows), math.ceil(sum(lengths[row] for row in rows) / max_tokens)))
    count = math.ceil(count / num_processes) * num_processes
    micros: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for place in sorted(range(len(rows)), key=lambda place: (-lengths[rows[place]], place)):
        open_micros = (m for m in range(count) if len(micros[m]) < rows_per_micro)
        micro = min(open_micros, key=lambda m: (tokens[m], m))
        micros[micro].append(place)
        tokens[micro] += lengths[rows[place]]
    return [[rows[place] for place in sorted(micro)] for micro in micros]


def share_of_process(
    rows: Sequence[int],
    lengths: Sequence[int],
    rows_per_micro: int,
    rank: int,
    num_processes: int,
    max_tokens: int | None = None,
) -> list[tuple[list[int], bool]]:
    """(rows, whether they are idle) of each micro-batch of one process. Every process has equally many.

    One with nothing to do is idle: it computes the shortest row of the update, and nothing comes of it, because all
    must take part whenever a layer is gathered.
    """
    shortest = min(rows, key=lambda row: lengths[row])
    micros = share_out(rows, lengths, rows_per_micro, num_processes, max_tokens)[rank::num_processes]
    return [(micro or [shortest], not micro) for micro in micros]


def longest_micro(
    plan: BatchPlan,
    lengths: Sequence[int],
    rows_per_micro: int,
    start: int = 0,
    num_processes: int = 1,
    max_tokens: int | None = None,
) -> list[int]:
    """The rows of the micro-batch with the most tokens among updates start.. of the plan, in any process."""
    updates = ([row for micro in update for row in micro] for _, update in plan.updates(start))
    micros = (
        micro for rows in updates for micro in share_out(rows, lengths, rows_per_micro, num_processes, max_tokens)
    )
    return max(micros, key=lambda micro: sum(lengths[row] for row in micro), default=[])
