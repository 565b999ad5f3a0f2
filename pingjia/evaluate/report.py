"""What an evaluation found: one row per question, summaries over them, and its JSON file. Runs nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pingjia.chat.tokenizer import as_messages
from pingjia.chat.tools import as_row
from pingjia.errors import DataError, RequestError
from pingjia.evaluate.bootstrap import mean_interval
from pingjia.evaluate.settings import METRICS
from pingjia.evaluate.store import write_whole
from pingjia.ledger import Fact
from pingjia.types import FinishReason, Message, Usage

VERSION = 1
NO_DOMAIN = "(no domain)"


@dataclass(frozen=True, slots=True)
class Row:
    """One question, its answer and the scores that apply to it (0 to 1).

    expected_logprob: sum of ln p over the `expected_tokens` of the expected answer; no tokens where it was not asked.
    """

    prompt: tuple[Message, ...]
    expected: str
    answer: str
    scores: dict[str, float]
    finish_reason: FinishReason
    where: str = ""
    domain: str | None = None
    lang: str = ""
    facts: tuple[str, ...] = ()
    missing_facts: tuple[str, ...] = ()
    usage: Usage = Usage()  # noqa: RUF009  frozen
    expected_logprob: float = 0.0
    expected_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """Mean of one metric over `count` questions, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class Group:
    """Summary of some rows. `num_cut` answers ran into max_tokens, `num_failed` ended in an error; both are scored.

    A metric that applies to none of the rows is absent from `scores`. `perplexity`: of the expected answers, over all
    their tokens; None where the metric `token_probability` was not asked for.
    """

    count: int
    num_cut: int
    num_failed: int
    scores: dict[str, Score]
    perplexity: float | None = None


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Rows in question order and their summaries: overall, per domain, per language. Build it with `of`.

    `encoder`: what `bert_score` compared with; empty without that metric.
    """

    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    max_tokens: int
    seconds: float
    overall: Group
    domains: dict[str, Group]
    languages: dict[str, Group]
    encoder: str = ""

    @classmethod
    def of(
        cls, rows: Iterable[Row], metrics: Sequence[str], *, max_tokens: int, seconds: float, encoder: str = ""
    ) -> EvalReport:
        """Summarise the rows. Raises DataError without any."""
        rows = tuple(rows)
        if not rows:
            raise DataError("a report without a single row has no score; evaluate at least one question")
        return cls(
            rows=rows,
            metrics=tuple(metrics),
            max_tokens=max_tokens,
            seconds=seconds,
            overall=_summary(rows, metrics),
            domains={name: _summary(some, metrics) for name, some in by_domain(rows).items()},
            languages={name: _summary(some, metrics) for name, some in by_language(rows).items()},
            encoder=encoder,
        )

    def fact(self, kind: str, *, run: str = "") -> Fact:
        """What the evaluation took, for the ledger (kind "eval.before" or "eval.after")."""
        return Fact(
            kind=kind,
            run=run,
            seconds=self.seconds,
            prompt_tokens=sum(row.usage.prompt_tokens for row in self.rows),
            completion_tokens=sum(row.usage.completion_tokens for row in self.rows),
            cached_tokens=sum(row.usage.cached_tokens for row in self.rows),
            num_requests=len(self.rows),
        )

    def groups(self) -> list[tuple[str, Group]]:
        """("overall" | "domain NAME" | "language NAME", summary), in printing order; a lone language is no group."""
        return [
            ("overall", self.overall),
            *((f"domain {name}", group) for name, group in self.domains.items()),
            *((f"language {name}", group) for name, group in self.languages.items() if len(self.languages) > 1),
        ]

    def lines(self) -> list[str]:
        """The summary for a terminal; scores out of 100."""
        found = [f"{name}: {_group_text(group, self.metrics)}" for name, group in self.groups()]
        unscored = [name for name in self.metrics if name not in self.overall.scores]
        return found + [f"{name}: not scored: no question has what it compares with" for name in unscored]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: settings, summaries, rows."""
        found = {"v": VERSION, **dataclasses.asdict(self)}
        for raw, row in zip(found["rows"], self.rows, strict=True):
            raw["prompt"] = [as_row(message) for message in row.prompt]
        return found

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON file, whole or not at all. Raises StorageError."""
        return write_whole(path, json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvalReport:
        """Read a saved report; summaries are computed again from its rows. Raises DataError."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            if raw["v"] != VERSION:
                raise DataError(f"{path}: report version {raw['v']!r}; this pingjia reads {VERSION}: evaluate again")
            _check_metrics(raw["metrics"])
            rows = [_row(item) for item in raw["rows"]]
            encoder, max_tokens, seconds = raw.get("encoder", ""), int(raw["max_tokens"]), float(raw["seconds"])
            return cls.of(rows, raw["metrics"], max_tokens=max_tokens, seconds=seconds, encoder=str(encoder))
        except OSError as e:
            raise DataError(f"{path}: report cannot be read: {e.strerror or e}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RequestError) as e:
            raise DataError(f"{path}: not an evaluation report ({type(e).__name__}: {e})") from None


def by_domain(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by domain, names sorted; empty when no row has one."""
    if all(row.domain is None for row in rows):
        return {}
    return _grouped(rows, lambda row: row.domain if row.domain is not None else NO_DOMAIN)


def by_language(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by language, names sorted."""
    return _grouped(rows, lambda row: row.lang)


def percent(value: float) -> str:
    """A score as reports print it: out of 100, one decimal."""
    return f"{100 * value:.1f}"


def _grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return dict(sorted(found.items()))


def _summary(rows: Sequence[Row], metrics: Sequence[str]) -> Group:
    columns = {name: [row.scores[name] for row in rows if name in row.scores] for name in metrics}
    scores = {name: Score(*mean_interval(values), len(values)) for name, values in columns.items() if values}
    return Group(
        count=len(rows),
        num_cut=sum(row.finish_reason == "length" for row in rows),
        num_failed=sum(row.finish_reason in ("error", "cancelled") for row in rows),
        scores=scores,
        perplexity=_perplexity(rows),
    )


def _perplexity(rows: Sequence[Row]) -> float | None:
    num_tokens = sum(row.expected_tokens for row in rows)
    if not num_tokens:
        return None
    mean = -sum(row.expected_logprob for row in rows) / num_tokens
    return math.exp(min(mean, 700.0))  # beyond that a float has no number for it


def _group_text(group: Group, metrics: Sequence[str]) -> str:
    parts = [f"{group.count} questions"]
    for name in metrics:
        if name in group.scores:
            score = group.scores[name]
            parts.append(f"{name} {percent(score.mean)} [{percent(score.low)}, {percent(score.high)}]")
    if group.perplexity is not None:
        parts.append(f"perplexity {group.perplexity:.4g}")
    if group.num_cut:
        parts.append(f"{group.num_cut} cut at max_tokens")
    if group.num_failed:
        parts.append(f"{group.num_failed} FAILED")
    return ", ".join(parts)


def _check_metrics(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r}")


def _row(raw: dict[str, Any]) -> Row:
    return Row(
        **{
            **raw,
            "prompt": tuple(as_messages([message])[0] for message in raw["prompt"]),
            "scores": {str(name): float(value) for name, value in raw["scores"].items()},
            "facts": tuple(raw["facts"]),
            "missing_facts": tuple(raw["missing_facts"]),
            "usage": Usage(**raw["usage"]),
        }
    )
