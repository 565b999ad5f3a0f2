"""What became of a data set, in numbers and examples: the same facts for the page (`report_page.py`) and for programs.

Holds no personal data: texts that are shown were masked before they came here.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pingjia.data.histogram import Histogram
from pingjia.data.rendered import Piece

FORMAT = 1
MAX_SAMPLES = 5
MAX_TEXT = 300


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the funnel: records before it and after it."""

    name: str
    num_in: int
    num_out: int


@dataclass(frozen=True, slots=True)
class Share:
    """A language or a domain before and after: rows (after: repeats counted) and characters.

    `wanted`: the share that was asked for; `weight`: of its rows in the loss.
    """

    name: str
    num_before: int
    num_after: int
    weight: float = 1.0
    chars_before: int = 0
    chars_after: int = 0
    wanted: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One record that was left out, changed, or repeats another."""

    where: str
    reason: str
    text: str


@dataclass(slots=True)
class Rule:
    """How often a rule spoke, and its first records."""

    count: int = 0
    samples: list[Sample] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        self.count += 1
        if len(self.samples) < MAX_SAMPLES:
            self.samples.append(sample)


@dataclass(frozen=True, slots=True)
class Repeat:
    """Two records that say the same. `rule`: "duplicate", "near_duplicate" or "leak"; the first one was left out."""

    rule: str
    where: str
    text: str
    other_where: str
    other_text: str


@dataclass(slots=True)
class Scores:
    """BERTScore F1 of one comparison."""

    threshold: float
    histogram: Histogram
    num_below: int = 0


@dataclass(slots=True)
class DataReport:
    """Everything the page shows. Counts are of records: a row that was split counts once for each part.

    `num_rows` are of the files; of those and the `num_made` ones, `num_kept` are in the training set.
    `refused` counts questions that were not reworded, by "maker: rule".
    """

    title: str = ""
    created: str = ""
    files: list[tuple[str, int]] = field(default_factory=list)
    model: str = ""
    cutoff_len: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    num_rows: int = 0
    num_kept: int = 0
    num_written: int = 0
    num_rejected: int = 0
    num_changed: int = 0
    num_made: int = 0
    num_other_domains: int = 0
    stages: list[Stage] = field(default_factory=list)
    lengths: Histogram | None = None
    zh_before: float | None = None
    zh_after: float | None = None
    min_zh_share: float | None = None
    languages: list[Share] = field(default_factory=list)
    domains: list[Share] = field(default_factory=list)
    rejects: dict[str, Rule] = field(default_factory=dict)
    changes: dict[str, Rule] = field(default_factory=dict)
    personal: dict[str, int] = field(default_factory=dict)
    repeats: list[Repeat] = field(default_factory=list)
    quality: dict[str, Scores] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    made_samples: list[tuple[str, str]] = field(default_factory=list)
    examples: list[list[Piece]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    inputs: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def of(cls, value: dict[str, Any]) -> DataReport:
        """The report that `to_dict` was."""
        value = {key: item for key, item in value.items() if key != "format"}
        value["files"] = [tuple(file) for file in value["files"]]
        value["lengths"] = Histogram(**value["lengths"]) if value["lengths"] else None
        for key, kind in _LISTS.items():
            value[key] = [kind(**item) for item in value[key]]
        for key in ("rejects", "changes"):
            value[key] = {name: _rule(rule) for name, rule in value[key].items()}
        value["quality"] = {
            name: Scores(s["threshold"], Histogram(**s["histogram"]), s["num_below"])
            for name, s in value["quality"].items()
        }
        value["made_samples"] = [tuple(pair) for pair in value["made_samples"]]
        value["examples"] = [[Piece(**piece) for piece in pieces] for pieces in value["examples"]]
        return cls(**value)


_LISTS: dict[str, Any] = {"stages": Stage, "languages": Share, "domains": Share, "repeats": Repeat}


def _rule(value: dict[str, Any]) -> Rule:
    return Rule(value["count"], [Sample(**sample) for sample in value["samples"]])


def load_report(path: Path) -> DataReport | None:
    """A report.json, or None when there is none that can be read."""
    try:
        return DataReport.of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


# ---- user text, as it may be shown


_UNSHOWABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)


def clean(text: str) -> str:
    """Text without what would steer a terminal or turn a page around: control characters become signs for them."""
    return _UNSHOWABLE.sub(lambda match: _sign(ord(match.group())), text)


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)  # ␀ and so on
    return "\u2421" if code == 0x7F else "\ufffd"


def shorten(text: str, limit: int = MAX_TEXT) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def percent(share: float | None, least: float | None = None) -> str:
    """78.8%. Never 100% or 0% for what is only nearly so, nor a share that looks like the least that it misses."""
    if share is None:
        return "–"
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    misses = least is not None and share < least and f"{share:.1%}" == f"{least:.1%}"
    return f"{share:.3%}" if misses else f"{share:.1%}"


# ---- in a few lines


def summary_lines(report: DataReport) -> list[str]:
    """The report in a few lines, for a terminal."""
    lines = [_counts(report)]
    if report.zh_after is not None:
        lines.append(_chinese(report))
    lines += [f"left out {rule.count:,}: {name}" for name, rule in report.rejects.items()]
    if report.num_other_domains:
        lines.append(f"not asked for {report.num_other_domains:,}: rows of other domains")
    if report.personal:
        lines.append("personal data: " + ", ".join(f"{kind} {count:,}" for kind, count in report.personal.items()))
    for name, scores in report.quality.items():
        lines.append(
            f"BERTScore, {name}: {scores.histogram.num:,} compared, {scores.num_below:,} below {scores.threshold:g}"
        )
    lines += [f"not made {count:,}: {why}" for why, count in report.refused.items()]
    if any(d.name != "-" for d in report.domains):
        lines.append("domains: " + _listed(report.domains))
    if report.lengths is not None and report.lengths.num:
        lines.append(_length(report.lengths, report.cutoff_len))
    return [clean(line).replace("\n", " ") for line in lines]


_MAX_LISTED = 8


def _counts(report: DataReport) -> str:
    made = f" and {report.num_made:,} made from them" if report.num_made else ""
    return (
        f"{report.num_rows:,} rows{made}: {report.num_kept:,} kept, {report.num_rejected:,} left out"
        + (f", {report.num_changed:,} changed" if report.num_changed else "")
        + (f"; {report.num_written:,} written" if report.num_written != report.num_kept else "")
    )


def _chinese(report: DataReport) -> str:
    least = report.min_zh_share
    before = f" (before: {percent(report.zh_before, least)})" if report.zh_before is not None else ""
    minimum = f", at least {least:.0%} wanted" if least is not None else ""
    return f"Chinese {percent(report.zh_after, least)} of the letters{before}{minimum}"


def _listed(shares: list[Share]) -> str:
    told = [f"{shorten(s.name, 40)} {s.num_before:,} -> {s.num_after:,}" for s in shares[:_MAX_LISTED]]
    return ", ".join(told) + (f" and {len(shares) - _MAX_LISTED} more" if len(shares) > _MAX_LISTED else "")


def _length(lengths: Histogram, cutoff_len: int) -> str:
    p50, p99 = lengths.quantile(0.5) or 0, lengths.quantile(0.99) or 0
    limit = f" (cutoff_len {cutoff_len:,})" if cutoff_len else ""
    return f"length in tokens: median {p50:,.0f}, 99 % {p99:,.0f}, longest {lengths.high or 0:,.0f}{limit}"
