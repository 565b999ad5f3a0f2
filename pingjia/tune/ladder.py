"""How a run uses less memory, one rung after the other. Pure: which rung comes next, and what it is called.

micro-batch halved, accumulation doubled, down to single rows -> gradient checkpointing -> half precision -> INT8 ->
INT4. The rows of an update and their order never change. What a rung does to the network is in `relief.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

HALF, INT8, INT4 = "bfloat16 base", "INT8 base", "INT4 base"


@dataclass(frozen=True, slots=True)
class Rung:
    """How a run computes. `bits`: what the ladder has packed the base to; None: as it was loaded."""

    rows_per_micro: int
    checkpointing: bool = False
    half: bool = False
    bits: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """From one rung to the next: what changed, and what was passed over and why."""

    rung: Rung
    change: str
    skipped: tuple[str, ...]


def next_step(rung: Rung, rows_per_update: int, refused: Mapping[str, str]) -> Step | None:
    """The next rung that this network can stand on. None when there is none.

    refused: HALF, INT8, INT4 -> why this network cannot.
    """
    skipped: list[str] = []
    for name, after in _below(rung):
        if name in refused:
            skipped.append(f"{name} passed over: {refused[name]}")
        else:
            change = name or _change_of_rows(rung, after, rows_per_update)
            return Step(after, change, tuple(skipped))
    return None


def skipped_of(rung: Rung, refused: Mapping[str, str]) -> list[str]:
    """What could still come, and why it does not."""
    return [f"{name}: {refused[name]}" for name, _ in _below(rung) if name in refused]


def _below(rung: Rung) -> Iterator[tuple[str, Rung]]:
    """Every rung that may follow, best first; the name of a change of rows is empty."""
    if rung.rows_per_micro > 1:
        yield "", replace(rung, rows_per_micro=math.ceil(rung.rows_per_micro / 2))
    if not rung.checkpointing:
        yield "gradient checkpointing", replace(rung, checkpointing=True)
    if not rung.half and rung.bits is None:
        yield HALF, replace(rung, half=True)
    if rung.bits is None:
        yield INT8, replace(rung, bits=8)
    if rung.bits != 4:
        yield INT4, replace(rung, bits=4)


def _change_of_rows(before: Rung, after: Rung, rows_per_update: int) -> str:
    def count(rung: Rung) -> int:
        return math.ceil(rows_per_update / rung.rows_per_micro)

    return (
        f"micro-batch {before.rows_per_micro} -> {after.rows_per_micro} rows, accumulation "
        f"{count(before)} -> {count(after)}; the rows of an update stay the same"
    )


def path(start: Rung, goal: Rung, refused: Mapping[str, str]) -> list[Rung]:
    """The rungs from `start` (left out) to `goal`: a resumed run goes them again, in the same order."""
    rungs: list[Rung] = []
    rung = start
    while rung != goal:
        step = next_step(rung, 1, refused)
        if step is None:
            raise ValueError(f"{goal} does not lie below {start}")
        rung = step.rung
        rungs.append(rung)
    return rungs
