"""A quality report for a terminal, as Markdown, and as an HTML page, both answers side by side. Text is escaped."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path

from pingjia.evaluate.bias import DISCERNING, Reliability
from pingjia.evaluate.dialogue import Dialogue
from pingjia.evaluate.page import STYLE, html_table, markdown_table
from pingjia.evaluate.quality import MarkedQuestion, QualityReport, Share, Standing
from pingjia.evaluate.report import Score
from pingjia.evaluate.store import write_whole

HEADER = ("group", "questions", "quality", "95 % interval", "length left in", "marks", "won / tied / lost")
JUDGE_HEADER = (
    "judge",
    "sees planted faults",
    "pleas refused",
    "first place",
    "twice the length",
    "same both ways",
    "fit",
)


def save_quality(report: QualityReport, folder: str | os.PathLike[str]) -> list[Path]:
    """Write quality.json, quality.md and quality.html; returns their paths. Raises StorageError."""
    where = Path(folder)
    data = json.dumps(report.to_dict(), ensure_ascii=False, indent=1) + "\n"
    return [
        write_whole(where / "quality.json", data),
        write_whole(where / "quality.md", to_markdown(report)),
        write_whole(where / "quality.html", to_html(report)),
    ]


def conclusion(report: QualityReport) -> str:
    """The result in one sentence."""
    wanted = f"{100 * report.threshold:g} %"
    if report.overall is None:
        return (
            f"no result: no judge saw at least {DISCERNING:.0%} of the planted bad answers, so the marks say nothing; "
            "take a stronger judge"
        )
    words = {
        "passed": f"passed: all of the interval reaches {wanted}",
        "failed": f"failed: all of the interval is below {wanted}",
        "undecided": f"undecided: the interval holds {wanted}; more questions or more judges narrow it",
    }[report.verdict]
    share = report.overall.share
    return (
        f"{report.candidate}: {_percent(share)} of {report.reference}'s quality (95 % CI {_interval(share)}); {words}"
    )


def remarks(report: QualityReport) -> list[str]:
    """What a reader must know beside the figure: judges left out, biases taken out, marks that are missing."""
    found = [
        f"{name} is left out: it saw {_share_of(worth.discernment)} of the planted bad answers, less than "
        f"{DISCERNING:.0%}"
        for name, worth in report.judges.items()
        if not worth.is_fit
    ]
    found += [
        f"{name} gives marks for length alone ({_marks(worth.length)} for e times the characters); they are taken off"
        for name, worth in report.judges.items()
        if worth.is_fit and worth.rewards_length
    ]
    found += [
        f"{name}: the first place is worth {_marks(worth.place)}; both orders are asked, so it cancels"
        for name, worth in report.judges.items()
        if worth.is_fit and worth.place is not None and (worth.place.low > 0 or worth.place.high < 0)
    ]
    unread = sum(worth.num_unread for worth in report.judges.values())
    if unread:
        found.append(f"{unread} mark(s) could not be read; {report.num_unread} question(s) have none at all")
    if report.num_cut:
        found.append(f"{report.num_cut} answer(s) ran into the limit of tokens and are marked as they are")
    return found


def agreement_lines(report: QualityReport) -> list[str]:
    """Judges beside people and beside each other, a line each."""
    pairs = [(f"{name} and people", a) for name, a in report.with_people.items()]
    pairs += [(name, a) for name, a in report.between_judges.items()]
    return [
        f"{name}: alike in {_share_of(a.alike)} of {a.alike.count} pairs"
        + (f", {_share_of(a.decided)} where both decide" if a.decided else "")
        + (f", kappa {a.kappa:.2f}" if a.kappa is not None else "")
        for name, a in pairs
    ]


def standing_cells(report: QualityReport) -> list[list[str]]:
    """The rows under HEADER."""
    return [_cells(name, standing) for name, standing in report.groups()]


def judge_cells(report: QualityReport) -> list[list[str]]:
    """The rows under JUDGE_HEADER."""
    return [_judge(name, worth) for name, worth in report.judges.items()]


def to_markdown(report: QualityReport) -> str:
    """Conclusion, tables, remarks."""
    lines = ["# Dialogue quality", "", conclusion(report), "", *markdown_table(HEADER, standing_cells(report)), ""]
    lines += ["## Judges", "", *markdown_table(JUDGE_HEADER, judge_cells(report)), ""]
    lines += [f"- {text}" for text in (*remarks(report), *agreement_lines(report))]
    return "\n".join(lines) + "\n"


def to_html(report: QualityReport) -> str:
    """One page: the same, then every question with both answers and their marks. No script, nothing loaded."""
    notes = "".join(f"<li>{html.escape(text)}</li>" for text in (*remarks(report), *agreement_lines(report)))
    return _PAGE.format(
        style=STYLE + ".answers { grid-template-columns: repeat(2, 1fr) }",
        conclusion=html.escape(conclusion(report)),
        standings=html_table(HEADER, standing_cells(report)),
        judges=html_table(JUDGE_HEADER, judge_cells(report)),
        notes=notes,
        count=len(report.questions),
        questions="\n".join(_question(i, question, report) for i, question in enumerate(report.questions, start=1)),
    )


def _cells(name: str, standing: Standing) -> list[str]:
    share = standing.share
    marks = f"{standing.candidate:.2f} / {standing.reference:.2f}"
    played = f"{standing.wins} / {standing.ties} / {standing.losses}"
    return [name, str(standing.count), _percent(share), _interval(share), _percent(standing.raw), marks, played]


def _judge(name: str, worth: Reliability) -> list[str]:
    doubled = f"{0.6931 * worth.length.mean:+.2f}" if worth.length else "-"
    place = f"{worth.place.mean:+.2f}" if worth.place else "-"
    same = f"{worth.consistency:.0%}"
    fit = "yes" if worth.is_fit else "NO: left out"
    return [name, _share_of(worth.discernment), _share_of(worth.pleading), place, doubled, same, fit]


def _question(number: int, question: MarkedQuestion, report: QualityReport) -> str:
    asked = question.pair.left.question
    place = html.escape(f"{asked.id} {asked.category} {asked.lang}")
    left = [f"{name} {marks[0]:g}" for name, marks in question.marks.items()]
    right = [f"{name} {marks[1]:g}" for name, marks in question.marks.items()]
    return (
        f"<section><h3>{number} <small>{place}</small></h3>"
        f'<div class="answers">{_answers(report.candidate, question.pair.left, left)}'
        f"{_answers(report.reference, question.pair.right, right)}</div></section>"
    )


def _answers(title: str, dialogue: Dialogue, marks: list[str]) -> str:
    turns = "".join(
        f'<p class="asked" dir="auto">{html.escape(turn)}</p><p class="text" dir="auto">{html.escape(answer)}</p>'
        for turn, answer in zip(dialogue.question.turns, dialogue.answers, strict=True)
    )
    said = html.escape("; ".join(marks) or "no marks")
    return f"<article><h4>{html.escape(title)}</h4>{turns}<p><small>{said}</small></p></article>"


def _percent(share: Share) -> str:
    return f"{100 * share.value:.1f} %"


def _interval(share: Share) -> str:
    return f"{100 * share.low:.1f}-{100 * share.high:.1f} %"


def _share_of(score: Score | None) -> str:
    return f"{score.mean:.0%}" if score else "-"


def _marks(score: Score | None) -> str:
    return f"{score.mean:+.2f} marks [{score.low:+.2f}, {score.high:+.2f}]" if score else "-"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Dialogue quality</title>
<style>{style}</style></head><body>
<h1>Dialogue quality</h1><p><strong>{conclusion}</strong></p>
{standings}
<h2>Judges</h2>
{judges}
<ul>{notes}</ul>
<h2>All {count} questions</h2>
{questions}
</body></html>
"""
