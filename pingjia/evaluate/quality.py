"""How good an assistant's answers are beside a reference's: X % of its marks, how sure that is, and by which judges.

Marks and judges come from `judge.py` and `bias.py`; here they become one figure. Asks nobody.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from pingjia.evaluate.agreement import Agreement, agreement, choice
from pingjia.evaluate.bias import LENGTH_RANGE, Reliability
from pingjia.evaluate.bootstrap import CONFIDENCE, RESAMPLES, SEED
from pingjia.evaluate.judge import HIGHEST, LOWEST, Judged, Pair

THRESHOLD = 0.85
Verdict = Literal["passed", "failed", "undecided", "no fit judge"]


@dataclass(frozen=True, slots=True)
class Share:
    """Mean marks of the candidate divided by those of the reference, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Standing:
    """Candidate and reference over some questions.

    `share`: place and length taken out; `raw`: place alone (both orders are always averaged). `candidate` and
    `reference` are the mean marks behind `share`. A win is more marks in both orders, counted over the judges.
    """

    count: int
    share: Share
    raw: Share
    candidate: float
    reference: float
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True, slots=True)
class MarkedQuestion:
    """A question, both answers, and each fit judge's (candidate, reference) marks, the mean of both orders."""

    pair: Pair
    marks: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class QualityReport:
    """The result. `overall` is None where no judge is fit. `num_unread`: questions of which no mark could be read."""

    candidate: str
    reference: str
    threshold: float
    overall: Standing | None
    categories: dict[str, Standing]
    languages: dict[str, Standing]
    judges: dict[str, Reliability]
    between_judges: dict[str, Agreement]
    with_people: dict[str, Agreement]
    questions: tuple[MarkedQuestion, ...]
    num_unread: int
    num_cut: int = 0

    @property
    def verdict(self) -> Verdict:
        """ "passed" when the whole interval reaches the threshold, "failed" when none of it does."""
        if self.overall is None:
            return "no fit judge"
        if self.overall.share.low >= self.threshold:
            return "passed"
        return "failed" if self.overall.share.high < self.threshold else "undecided"

    def groups(self) -> list[tuple[str, Standing]]:
        """("overall" | "category NAME" | "language NAME", standing), in printing order."""
        named = [(f"category {name}", standing) for name, standing in self.categories.items()]
        named += [(f"language {name}", s) for name, s in self.languages.items() if len(self.languages) > 1]
        return [("overall", self.overall), *named] if self.overall is not None else []

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, texts of the answers left out: they are in the files of answers."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "questions"}
        plain = {key: _plain(value) for key, value in found.items()}
        for name, worth in self.judges.items():
            plain["judges"][name] |= {"is_fit": worth.is_fit, "rewards_length": worth.rewards_length}
        marks = [{"id": q.pair.left.question.id, "marks": q.marks} for q in self.questions]
        return {"v": 1, "verdict": self.verdict, **plain, "questions": marks}


@dataclass(frozen=True, slots=True)
class _Marks:
    """Of the fit judges J and the questions N that have marks. slopes: of each judge's padded probes, or zeros."""

    candidate_JN: np.ndarray
    reference_JN: np.ndarray
    log_length_N: np.ndarray
    slopes: tuple[np.ndarray, ...]


def measure(
    pairs: Sequence[Pair],
    judged: Mapping[str, Sequence[Judged]],
    judges: Mapping[str, Reliability],
    *,
    candidate: str,
    reference: str,
    threshold: float = THRESHOLD,
    with_people: Mapping[str, Agreement] | None = None,
) -> QualityReport:
    """From the marks of every judge to the report; the candidate is each pair's left side.

    A judge that is not fit is named and left out. What a judge gives for length alone (only where that is beyond
    chance) is taken off the candidate's marks, up to answers four times as long or as short.
    """
    fit = {name: judged[name] for name, worth in judges.items() if worth.is_fit}
    marked = [MarkedQuestion(pair, _marks_of(i, fit)) for i, pair in enumerate(pairs)]
    readable = [i for i, question in enumerate(marked) if question.marks]
    standing = _standings(marked, fit, judges)
    return QualityReport(
        candidate=candidate,
        reference=reference,
        threshold=threshold,
        overall=standing(readable) if readable else None,
        categories=_by(marked, readable, lambda q: q.pair.left.question.category, standing),
        languages=_by(marked, readable, lambda q: q.pair.left.question.lang, standing),
        judges=dict(judges),
        between_judges=_between(fit),
        with_people=dict(with_people or {}),
        questions=tuple(marked),
        num_unread=len(pairs) - len(readable) if fit else 0,
        num_cut=sum(pair.left.num_cut + pair.right.num_cut for pair in pairs),
    )


def _marks_of(index: int, fit: Mapping[str, Sequence[Judged]]) -> dict[str, tuple[float, float]]:
    means = {name: judged[index].mean for name, judged in fit.items()}
    return {name: mean for name, mean in means.items() if mean is not None}


def _standings(
    marked: Sequence[MarkedQuestion], fit: Mapping[str, Sequence[Judged]], judges: Mapping[str, Reliability]
) -> Callable[[Sequence[int]], Standing]:
    slopes = tuple(_slopes(judges[name]) for name in fit)

    def standing(indices: Sequence[int]) -> Standing:
        questions = [marked[i] for i in indices]
        both = np.array([[q.marks.get(name, (math.nan, math.nan)) for q in questions] for name in fit])
        lengths = np.array([_log_length(q.pair) for q in questions])
        marks = _Marks(both[..., 0], both[..., 1], lengths, slopes)
        plain = dataclasses.replace(marks, slopes=tuple(np.zeros(1) for _ in fit))
        candidate, reference = _means(marks)
        wins = [_winner([judged[i] for judged in fit.values()]) for i in indices]
        return Standing(
            count=len(questions),
            share=_share(marks),
            raw=_share(plain),
            candidate=candidate,
            reference=reference,
            wins=sum(w > 0 for w in wins),
            ties=sum(w == 0 for w in wins),
            losses=sum(w < 0 for w in wins),
        )

    return standing


def _slopes(worth: Reliability) -> np.ndarray:
    return np.array(worth.length_effects) if worth.rewards_length else np.zeros(1)


def _log_length(pair: Pair) -> float:
    ratio = math.log(max(1, pair.left.num_chars) / max(1, pair.right.num_chars))
    return max(-LENGTH_RANGE, min(LENGTH_RANGE, ratio))


def _means(marks: _Marks) -> tuple[float, float]:
    """Mean marks of candidate (length taken out) and reference."""
    slopes_J = np.array([effects.mean() for effects in marks.slopes])
    candidate_N = np.nanmean(marks.candidate_JN, axis=0) - slopes_J @ _weights(marks) * marks.log_length_N
    return _on_scale(candidate_N.mean()), float(np.nanmean(marks.reference_JN, axis=0).mean())


def _weights(marks: _Marks) -> np.ndarray:
    """Of each judge in each question's mean, [J, N]: those whose marks could be read count alike."""
    read_JN = ~np.isnan(marks.candidate_JN)
    return read_JN / read_JN.sum(axis=0)


def _share(marks: _Marks) -> Share:
    """Questions are resampled, each with all its marks; the length probes of each judge are resampled too."""
    rng = np.random.default_rng(SEED)
    count = len(marks.log_length_N)
    draws_BN = rng.integers(count, size=(RESAMPLES, count))
    drawn = [_resampled(effects, rng) for effects in marks.slopes]
    taken_BN = np.stack(drawn, axis=1) @ _weights(marks) * marks.log_length_N
    candidate_BN = np.nanmean(marks.candidate_JN, axis=0)[draws_BN] - np.take_along_axis(taken_BN, draws_BN, axis=1)
    reference_BN = np.nanmean(marks.reference_JN, axis=0)[draws_BN]
    means_B = np.clip(candidate_BN.mean(axis=1), LOWEST, HIGHEST)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means_B / reference_BN.mean(axis=1), [tail, 1 - tail])
    candidate, reference = _means(marks)
    return Share(candidate / reference, float(low), float(high))


def _resampled(effects: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return effects[rng.integers(len(effects), size=(RESAMPLES, len(effects)))].mean(axis=1)


def _on_scale(mark: float) -> float:
    return float(min(HIGHEST, max(LOWEST, mark)))


def _winner(judged: Sequence[Judged]) -> int:
    """1 where more judges choose the candidate than the reference, -1 the other way round."""
    votes = [{"left": 1, "right": -1}.get(choice(j) or "tie", 0) for j in judged]
    return (sum(votes) > 0) - (sum(votes) < 0)


def _by(
    marked: Sequence[MarkedQuestion],
    readable: Sequence[int],
    key: Callable[[MarkedQuestion], str],
    standing: Callable[[Sequence[int]], Standing],
) -> dict[str, Standing]:
    groups: dict[str, list[int]] = {}
    for i in readable:
        groups.setdefault(key(marked[i]), []).append(i)
    return {name: standing(indices) for name, indices in sorted(groups.items())}


def _between(fit: Mapping[str, Sequence[Judged]]) -> dict[str, Agreement]:
    found: dict[str, Agreement] = {}
    for (one, ours), (other, theirs) in combinations(fit.items(), 2):
        both = [(a, b) for a, b in zip(map(choice, ours), map(choice, theirs), strict=True) if a and b]
        if both:
            found[f"{one} / {other}"] = agreement([a for a, _ in both], [b for _, b in both])
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
