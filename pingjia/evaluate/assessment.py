"""Dialogue quality beside a reference, start to end: answers in, judges asked and checked, the report out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pingjia.errors import DataError
from pingjia.evaluate.agreement import Agreement, Labelled, agreement_with_people
from pingjia.evaluate.bias import Reliability, reliability
from pingjia.evaluate.dialogue import Dialogue
from pingjia.evaluate.judge import Judge, Judged, KeptMarks, OnMark, Pair, judge_pairs
from pingjia.evaluate.probes import NUM_PROBES, make_probes
from pingjia.evaluate.quality import THRESHOLD, QualityReport, measure


@dataclass(frozen=True, slots=True)
class Side:
    """An assistant by name, and its answers."""

    name: str
    dialogues: Sequence[Dialogue]


def assess(
    candidate: Side,
    reference: Side,
    judges: Sequence[Judge],
    *,
    threshold: float = THRESHOLD,
    people: Sequence[Labelled] = (),
    num_probes: int = NUM_PROBES,
    kept: KeptMarks | None = None,
    on_mark: Callable[[str], OnMark] = lambda judge: lambda: None,
) -> QualityReport:
    """Have every judge mark all pairs, the probes and the pairs people have labelled, in both orders.

    `on_mark(judge)` is called once per judge and gives what is called after each of its `num_marks` marks. Raises
    DataError where the two sides answer different questions or no judge is given; UserError when one cannot be reached.
    """
    pairs = _paired(candidate.dialogues, reference.dialogues)
    if not judges or len({judge.name for judge in judges}) < len(judges):
        raise DataError("a quality needs at least one judge, each named once")
    probes = make_probes(candidate.dialogues, reference.dialogues, num_probes)
    judged: dict[str, Sequence[Judged]] = {}
    worth: dict[str, Reliability] = {}
    with_people: dict[str, Agreement] = {}
    for judge in judges:
        everything = [*pairs, *(probe.pair for probe in probes), *(item.pair for item in people)]
        marks = judge_pairs(everything, judge, kept, on_mark(judge.name))
        judged[judge.name], rest = marks[: len(pairs)], marks[len(pairs) :]
        worth[judge.name] = reliability(judged[judge.name], probes, rest[: len(probes)])
        found = agreement_with_people(people, rest[len(probes) :])
        with_people |= {judge.name: found} if found is not None else {}
    return measure(
        pairs,
        judged,
        worth,
        candidate=candidate.name,
        reference=reference.name,
        threshold=threshold,
        with_people=with_people,
    )


def num_marks(num_questions: int, num_people: int, num_probes: int = NUM_PROBES) -> int:
    """About how many marks one judge gives: both orders of every pair and every probe."""
    return 2 * (num_questions + 4 * min(num_probes, num_questions) + num_people)


def _paired(candidate: Sequence[Dialogue], reference: Sequence[Dialogue]) -> list[Pair]:
    ours, theirs = [d.question.id for d in candidate], [d.question.id for d in reference]
    if ours != theirs or not ours:
        raise DataError("candidate and reference must answer the same questions, in the same order, at least one")
    return [Pair(left, right) for left, right in zip(candidate, reference, strict=True)]
