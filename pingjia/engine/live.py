"""What a step works on and comes to: requests that have not ended, and the rows of logits. Plain data; no network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pingjia.engine import sequence as sequences
from pingjia.engine.answer import Answer
from pingjia.engine.draft import Drafter
from pingjia.engine.sample import Pick, Sampler
from pingjia.engine.sequence import Slice
from pingjia.types import Request


@dataclass(slots=True)
class Live:
    """An accepted request that has not ended."""

    request: Request
    sequence: sequences.Sequence
    sampler: Sampler
    answer: Answer
    drafter: Drafter | None = None
    is_counted: bool = False

    @property
    def num_cached(self) -> int:
        return self.sequence.num_cached or 0


@dataclass(slots=True)
class Outcome:
    """What one step came to. `said`: every new token, those of followers included. `broken`: who failed, and why."""

    done: list[tuple[Slice, list[int]]] = field(default_factory=list)
    said: list[tuple[Live, Pick]] = field(default_factory=list)
    broken: list[tuple[Live, str]] = field(default_factory=list)


class Rows:
    """The rows of logits of a step: which are whose, which are sound, and where each is largest."""

    def __init__(self, plan: list[Slice], sound: list[bool], best: list[int]) -> None:
        ends = itertools.accumulate(piece.num_outputs for piece in plan)
        self.first = {piece: end - piece.num_outputs for piece, end in zip(plan, ends, strict=True)}
        self.best = best
        self._sound = sound

    def is_sound(self, piece: Slice) -> bool:
        return all(self._sound[self.first[piece] : self.first[piece] + piece.num_outputs])

    def chosen(self, piece: Slice) -> list[int]:
        return self.best[self.first[piece] : self.first[piece] + piece.num_outputs]


@contextmanager
def drafts_in_place(plan: list[Slice]) -> Iterator[None]:
    """Put the drafts that a plan tries at the end of their sequences, for as long as the network reads them."""
    for piece in plan:
        piece.sequence.tokens += piece.sequence.drafts[: piece.num_drafts]
    try:
        yield
    finally:
        for piece in plan:
            if piece.num_drafts:
                del piece.sequence.tokens[-piece.num_drafts :]
