"""Do two markers choose alike? A judge beside people's labels, or beside another judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pingjia.errors import DataError
from pingjia.evaluate.bootstrap import mean_interval
from pingjia.evaluate.dialogue import Dialogue, Question, rows_of_file
from pingjia.evaluate.judge import Judged, Pair
from pingjia.evaluate.report import Score

Choice = Literal["left", "tie", "right"]
_LABELS: dict[str, Choice] = {"a": "left", "b": "right", "tie": "tie"}


@dataclass(frozen=True, slots=True)
class Labelled:
    """Two answers and which one people prefer."""

    pair: Pair
    label: Choice


@dataclass(frozen=True, slots=True)
class Agreement:
    """`alike`: share of equal choices, ties too. `decided`: the same where neither says tie (None: nowhere).

    kappa: agreement beyond chance, 1 for full, 0 for none (Cohen, 1960); None where both always choose the same.
    """

    alike: Score
    decided: Score | None
    kappa: float | None


def read_labelled(path: str) -> list[Labelled]:
    """JSONL rows {"question" or "turns", "answer_a", "answer_b", "label": "a"|"b"|"tie"}; optional lang, guide, system.

    An answer is a text, or a list with one text per turn. Raises DataError naming the line.
    """
    found = [_labelled(raw, where) for raw, where in rows_of_file(path)]
    if not found:
        raise DataError(f"{path}: no labelled pairs")
    return found


def choice(judged: Judged) -> Choice | None:
    """The side with more marks in both orders; tie where the orders disagree or marks are equal. None: unread."""
    if judged.both is None:
        return None
    sides = {_side(*marks) for marks in judged.both}
    return sides.pop() if len(sides) == 1 else "tie"


def agreement(one: Sequence[Choice], other: Sequence[Choice]) -> Agreement:
    """Of two lists of choices about the same pairs. Raises ValueError without any."""
    both = list(zip(one, other, strict=True))
    decided = [float(a == b) for a, b in both if "tie" not in (a, b)]
    alike = [float(a == b) for a, b in both]
    return Agreement(
        alike=Score(*mean_interval(alike), len(alike)),
        decided=Score(*mean_interval(decided), len(decided)) if decided else None,
        kappa=_kappa(both),
    )


def agreement_with_people(labelled: Sequence[Labelled], judged: Sequence[Judged]) -> Agreement | None:
    """Of a judge with the labels, over the pairs whose marks could be read; None where none could."""
    both = [(item.label, choice(j)) for item, j in zip(labelled, judged, strict=True)]
    read = [(label, chosen) for label, chosen in both if chosen is not None]
    return agreement([label for label, _ in read], [chosen for _, chosen in read]) if read else None


def _kappa(both: Sequence[tuple[Choice, Choice]]) -> float | None:
    count = len(both)
    ours, theirs = Counter(a for a, _ in both), Counter(b for _, b in both)
    by_chance = sum(ours[label] * theirs[label] for label in ours) / count**2
    if by_chance == 1:
        return None
    return (sum(a == b for a, b in both) / count - by_chance) / (1 - by_chance)


def _side(left: float, right: float) -> Choice:
    return "tie" if left == right else "left" if left > right else "right"


def _labelled(raw: Mapping[str, Any], where: str) -> Labelled:
    turns = raw.get("turns", [raw["question"]] if "question" in raw else None)
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise DataError(f'{where}: needs "question" (a text) or "turns" (a list of texts)')
    label = raw.get("label")
    if not isinstance(label, str) or label.lower() not in _LABELS:
        raise DataError(f'{where}: label must be "a", "b" or "tie", not {label!r}')
    words = {key: str(raw[key]) for key in ("lang", "guide", "system", "category") if key in raw}
    question = Question(id=str(raw.get("id", where)), turns=tuple(turns), where=where, **words)
    sides = [Dialogue(question, _texts(raw.get(key), question, key)) for key in ("answer_a", "answer_b")]
    return Labelled(Pair(*sides), _LABELS[label.lower()])


def _texts(raw: Any, question: Question, key: str) -> tuple[str, ...]:
    texts = [raw] if isinstance(raw, str) else raw
    num_turns = len(question.turns)
    if not isinstance(texts, list) or len(texts) != num_turns or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{question.where}: {key}: a text, or a list of {num_turns} text(s), one for each turn")
    return tuple(texts)
