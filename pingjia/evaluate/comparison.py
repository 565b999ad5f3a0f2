"""Two reports over the same questions -> what changed, and how sure that is. How it looks is `render.py`'s."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pingjia.chat.tools import as_row
from pingjia.errors import DataError
from pingjia.evaluate.bootstrap import mean_interval
from pingjia.evaluate.report import EvalReport, Row, by_domain, by_language

Verdict = Literal["better", "worse", "unclear", "same"]


@dataclass(frozen=True, slots=True)
class Change:
    """One metric over the same `count` questions, before and after.

    `difference` is after - before with its paired 95 % bootstrap interval: questions are resampled, each with both of
    its scores, so what the two share cancels.
    """

    before: float
    after: float
    difference: float
    low: float
    high: float
    count: int
    num_better: int
    num_worse: int

    @property
    def verdict(self) -> Verdict:
        """ "better" or "worse" when the whole interval is on one side of 0; "same" when no single score moved."""
        if self.num_better == self.num_worse == 0:
            return "same"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "unclear"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Changes by metric: overall, per domain, per language; and the two reports they come from."""

    before: EvalReport
    after: EvalReport
    overall: dict[str, Change]
    domains: dict[str, dict[str, Change]]
    languages: dict[str, dict[str, Change]]

    def groups(self) -> list[tuple[str, dict[str, Change]]]:
        """("overall" | "domain NAME" | "language NAME", changes), in printing order; a lone language is no group."""
        return [
            ("overall", self.overall),
            *((f"domain {name}", changes) for name, changes in self.domains.items()),
            *((f"language {name}", changes) for name, changes in self.languages.items() if len(self.languages) > 1),
        ]

    def table(self) -> list[dict[str, Any]]:
        """One row per group and metric: group, metric, then the fields of Change and its verdict."""
        return [
            {"group": group, "metric": metric, **_change_dict(change)}
            for group, changes in self.groups()
            for metric, change in changes.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the changes, and per question both answers and both sets of scores."""
        return {
            "overall": _changes_dict(self.overall),
            "domains": {name: _changes_dict(changes) for name, changes in self.domains.items()},
            "languages": {name: _changes_dict(changes) for name, changes in self.languages.items()},
            "perplexity": {"before": self.before.overall.perplexity, "after": self.after.overall.perplexity},
            "num_cut": {"before": self.before.overall.num_cut, "after": self.after.overall.num_cut},
            "num_failed": {"before": self.before.overall.num_failed, "after": self.after.overall.num_failed},
            "questions": [_question_dict(*pair) for pair in self.pairs()],
        }

    def pairs(self) -> list[tuple[Row, Row]]:
        """Every question's row before and after."""
        return list(zip(self.before.rows, self.after.rows, strict=True))


def compare(before: EvalReport, after: EvalReport) -> Comparison:
    """Pair two reports question by question.

    Raises DataError when they did not ask the same questions in the same order, score by the same metrics, or allow
    answers of the same length: such a difference would say nothing about the model.
    """
    _check_comparable(before, after)
    partner = {id(old): new for old, new in zip(before.rows, after.rows, strict=True)}

    def changes(rows: Sequence[Row]) -> dict[str, Change]:
        return _changes([(row, partner[id(row)]) for row in rows], before.metrics)

    return Comparison(
        before=before,
        after=after,
        overall=changes(before.rows),
        domains={name: changes(rows) for name, rows in by_domain(before.rows).items()},
        languages={name: changes(rows) for name, rows in by_language(before.rows).items()},
    )


def _check_comparable(before: EvalReport, after: EvalReport) -> None:
    if len(before.rows) != len(after.rows):
        raise DataError(
            f"the reports asked {len(before.rows)} and {len(after.rows)} questions; evaluate both on the same files"
        )
    for i, (old, new) in enumerate(zip(before.rows, after.rows, strict=True), start=1):
        if _question(old) != _question(new):
            raise DataError(
                f"question {i} differs: {old.where or old.prompt!r} before, {new.where or new.prompt!r} after; "
                "prompt, expected answer and facts must be equal: evaluate both on the same files"
            )
    for name in ("metrics", "max_tokens", "encoder"):
        old_value, new_value = getattr(before, name), getattr(after, name)
        if old_value != new_value:
            raise DataError(f"the reports used different {name}: {old_value} before, {new_value} after; use one")


def _question(row: Row) -> tuple[Any, ...]:
    return row.prompt, row.expected, row.facts


def _changes(pairs: Sequence[tuple[Row, Row]], metrics: Sequence[str]) -> dict[str, Change]:
    found: dict[str, Change] = {}
    for name in metrics:
        scores = [(old.scores[name], new.scores[name]) for old, new in pairs if name in old.scores]
        if scores:
            found[name] = _change(scores)
    return found


def _change(scores: Sequence[tuple[float, float]]) -> Change:
    differences = [new - old for old, new in scores]
    difference, low, high = mean_interval(differences)
    return Change(
        before=sum(old for old, _ in scores) / len(scores),
        after=sum(new for _, new in scores) / len(scores),
        difference=difference,
        low=low,
        high=high,
        count=len(scores),
        num_better=sum(d > 0 for d in differences),
        num_worse=sum(d < 0 for d in differences),
    )


def _change_dict(change: Change) -> dict[str, Any]:
    return {**dataclasses.asdict(change), "verdict": change.verdict}


def _changes_dict(changes: dict[str, Change]) -> dict[str, Any]:
    return {metric: _change_dict(change) for metric, change in changes.items()}


def _question_dict(old: Row, new: Row) -> dict[str, Any]:
    return {
        "where": old.where,
        "prompt": [as_row(message) for message in old.prompt],
        "expected": old.expected,
        "facts": list(old.facts),
        "before": _answer_dict(old),
        "after": _answer_dict(new),
    }


def _answer_dict(row: Row) -> dict[str, Any]:
    return {
        "answer": row.answer,
        "scores": row.scores,
        "missing_facts": list(row.missing_facts),
        "finish_reason": row.finish_reason,
    }
