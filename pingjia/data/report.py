"""What became of a data set, in numbers and examples: the same facts for the page (`report_page.py`) and for programs.

Holds no personal data: texts that are shown were masked before they came here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pingjia.chat.tokenizer import Tokenizer
from pingjia.data.histogram import Histogram
from pingjia.types import Encoded

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
    """A language or a domain before and after: written rows (repeats counted) and letters."""

    name: str
    num_before: int
    num_after: int
    weight: float = 1.0


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


@dataclass(slots=True)
class Scores:
    """BERTScore F1 of one comparison."""

    threshold: float
    histogram: Histogram
    num_below: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens of an example as a reader sees them. `learnt`: whether the loss is taken on them."""

    text: str
    learnt: bool
    special: bool = False


@dataclass(slots=True)
class DataReport:
    """Everything the page shows. Counts are of records: a row that was split counts once for each part.

    `num_rows` are of the files; of those and the `num_made` ones, `num_kept` are in the training set.
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
        value["stages"] = [Stage(**stage) for stage in value["stages"]]
        value["lengths"] = Histogram(**value["lengths"]) if value["lengths"] else None
        for key in ("languages", "domains"):
            value[key] = [Share(**share) for share in value[key]]
        for key in ("rejects", "changes"):
            value[key] = {name: _rule(rule) for name, rule in value[key].items()}
        value["quality"] = {
            name: Scores(s["threshold"], Histogram(**s["histogram"]), s["num_below"])
            for name, s in value["quality"].items()
        }
        value["made_samples"] = [tuple(pair) for pair in value["made_samples"]]
        value["examples"] = [[Piece(**piece) for piece in pieces] for pieces in value["examples"]]
        return cls(**value)


def _rule(value: dict[str, Any]) -> Rule:
    return Rule(value["count"], [Sample(**sample) for sample in value["samples"]])


def load_report(path: Path) -> DataReport | None:
    """A report.json, or None when there is none that can be read."""
    try:
        return DataReport.of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def shorten(text: str, limit: int = MAX_TEXT) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def render_example(encoded: Encoded, tokenizer: Tokenizer) -> list[Piece]:
    """An example as its tokens read, learnt or not. Tokens that are parts of one character stand together."""
    pieces: list[Piece] = []
    held: list[int] = []
    for token, learnt in zip(encoded.ids, encoded.learn, strict=True):
        if not tokenizer.decode([token]) and not held:
            pieces.append(Piece(_name_of(token, tokenizer), learnt, special=True))
            continue
        held.append(token)
        text = tokenizer.decode(held)
        if "\ufffd" not in text or len(held) > 8:
            pieces.append(Piece(text, learnt))
            held = []
    if held:
        pieces.append(Piece(tokenizer.decode(held), encoded.learn[-1]))
    return _joined(pieces)


def _name_of(token: int, tokenizer: Tokenizer) -> str:
    return "⏹" if token in tokenizer.stop_ids else f"⟨{token}⟩"


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one kind as one: the border that matters is where learning begins and ends."""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if last and (last.learnt, last.special) == (piece.learnt, piece.special):
            result[-1] = Piece(last.text + piece.text, last.learnt, last.special)
        else:
            result.append(piece)
    return result


def summary_lines(report: DataReport) -> list[str]:
    """The report in a few lines, for a terminal."""
    lines = [
        f"{report.num_rows:,} rows{f' and {report.num_made:,} made from them' if report.num_made else ''}: "
        f"{report.num_kept:,} kept, {report.num_rejected:,} left out"
        + (f", {report.num_changed:,} changed" if report.num_changed else "")
        + (f"; {report.num_written:,} written" if report.num_written != report.num_kept else "")
    ]
    if report.zh_after is not None:
        before = f" (before: {report.zh_before:.1%})" if report.zh_before is not None else ""
        minimum = f", at least {report.min_zh_share:.0%} wanted" if report.min_zh_share is not None else ""
        lines.append(f"Chinese {report.zh_after:.1%} of the letters{before}{minimum}")
    lines += [f"left out {rule.count:,}: {name}" for name, rule in report.rejects.items()]
    if report.personal:
        lines.append("personal data: " + ", ".join(f"{kind} {count}" for kind, count in report.personal.items()))
    for name, scores in report.quality.items():
        lines.append(
            f"BERTScore, {name}: {scores.histogram.num:,} compared, {scores.num_below:,} below {scores.threshold:g}"
        )
    lines += [f"not made {count:,}: {why}" for why, count in report.refused.items()]
    named = [d for d in report.domains if d.name != "-"]
    if named:
        lines.append("domains: " + ", ".join(f"{d.name} {d.num_before:,} -> {d.num_after:,}" for d in report.domains))
    return lines
