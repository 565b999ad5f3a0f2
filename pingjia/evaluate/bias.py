"""What a judge's marks show about the judge: does it tell right from wrong, what are place and length worth to it?

Numbers only, from marks that are there; a judge is asked in `judge.py`, about pairs of `probes.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pingjia.evaluate.bootstrap import mean_interval
from pingjia.evaluate.judge import Judged
from pingjia.evaluate.probes import Probe
from pingjia.evaluate.report import Score

DISCERNING = 0.75  # of the planted faults, seen in both orders alike; marks at random see about 0.45
LENGTH_RANGE = math.log(4)  # corrected no further: what a judge does with longer ones was not measured


@dataclass(frozen=True, slots=True)
class Reliability:
    """What one judge is worth.

    discernment: share of the planted bad answers (off topic, pleading) that got fewer marks, over both orders.
    place: marks that being shown first is worth. consistency: share of pairs judged alike in both orders.
    length: marks that e times the characters are worth, from padded answers; `length_effects` are the values of each.
    num_unread: marks that could not be read.
    """

    discernment: Score | None
    pleading: Score | None
    place: Score | None
    consistency: float
    length: Score | None
    length_effects: tuple[float, ...]
    num_unread: int

    @property
    def is_fit(self) -> bool:
        """Whether its marks say something about answers: it sees at least DISCERNING of the planted bad ones."""
        return self.discernment is not None and self.discernment.mean >= DISCERNING

    @property
    def rewards_length(self) -> bool:
        """Whether marks for length alone are beyond chance; only then are they taken off."""
        return self.length is not None and self.length.low > 0


def reliability(judged: Sequence[Judged], probes: Sequence[Probe], probed: Sequence[Judged]) -> Reliability:
    """From the marks of the real pairs and of the probes."""
    whole = [j.both for j in judged if j.both is not None]
    everywhere = [*whole, *(j.both for j in probed if j.both is not None)]
    checks = {kind: _rights([j for p, j in zip(probes, probed, strict=True) if p.kind == kind]) for kind in _PLANTED}
    effects = _length_effects(probes, probed)
    return Reliability(
        discernment=_score([right for rights in checks.values() for right in rights]),
        pleading=_score(checks["pleading"]),
        place=_score([_place(*both) for both in everywhere]),
        consistency=sum(_sign(one) == _sign(other) for one, other in whole) / max(1, len(whole)),
        length=_score(effects),
        length_effects=tuple(effects),
        num_unread=sum((j.left_first is None) + (j.right_first is None) for j in [*judged, *probed]),
    )


_PLANTED = ("off_topic", "pleading")


def _rights(judged: Sequence[Judged]) -> list[float]:
    both = [marks for j in judged for marks in (j.left_first, j.right_first)]
    return [float(marks is not None and marks[0] > marks[1]) for marks in both]


def _place(left_first: tuple[float, float], right_first: tuple[float, float]) -> float:
    return (left_first[0] - left_first[1] + right_first[1] - right_first[0]) / 2


def _sign(marks: tuple[float, float]) -> int:
    return (marks[0] > marks[1]) - (marks[0] < marks[1])


def _length_effects(probes: Sequence[Probe], probed: Sequence[Judged]) -> list[float]:
    found: list[float] = []
    for probe, judged in zip(probes, probed, strict=True):
        if probe.kind == "padded" and judged.mean is not None:
            plain, padded = judged.mean
            found.append((padded - plain) / math.log(probe.pair.right.num_chars / probe.pair.left.num_chars))
    return found


def _score(values: Sequence[float]) -> Score | None:
    return Score(*mean_interval(values), len(values)) if values else None
