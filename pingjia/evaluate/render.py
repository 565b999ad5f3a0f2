"""A comparison as Markdown and as one self-contained HTML page. Answers are untrusted text: everything is escaped."""

from __future__ import annotations

import html
import os
from pathlib import Path

from pingjia.evaluate.comparison import Change, Comparison
from pingjia.evaluate.figure import draw_bars, draw_table
from pingjia.evaluate.page import STYLE, html_table, markdown_table
from pingjia.evaluate.report import Row, percent
from pingjia.evaluate.store import write_whole

HEADER = ("group", "metric", "questions", "before", "after", "change", "95 % interval", "verdict")
MARKDOWN_QUESTIONS = 20  # the HTML page shows all of them
MARKDOWN_CHARS = 300  # of one text in a table cell


def save_comparison(comparison: Comparison, directory: str | os.PathLike[str]) -> list[Path]:
    """Write comparison.md, comparison.html, comparison_table.png and comparison_bars.png; returns their paths.

    Raises StorageError when the disk refuses.
    """
    folder = Path(directory)
    cells = summary_cells(comparison)
    return [
        write_whole(folder / "comparison.md", to_markdown(comparison)),
        write_whole(folder / "comparison.html", to_html(comparison)),
        write_whole(folder / "comparison_table.png", draw_table(HEADER, cells)),
        write_whole(folder / "comparison_bars.png", draw_bars(comparison.overall)),
    ]


def summary_cells(comparison: Comparison) -> list[list[str]]:
    """The rows under HEADER as text; scores out of 100."""
    return [
        _cells(group, metric, change) for group, changes in comparison.groups() for metric, change in changes.items()
    ]


def to_markdown(comparison: Comparison) -> str:
    """Summary table, then the questions whose scores moved most (at most MARKDOWN_QUESTIONS of them)."""
    shown = sorted(comparison.pairs(), key=lambda pair: -_movement(*pair))[:MARKDOWN_QUESTIONS]
    lines = ["# Before and after", "", _caption(comparison), "", *markdown_table(HEADER, summary_cells(comparison)), ""]
    lines += [f"## Answers: {len(shown)} of {len(comparison.before.rows)} questions, largest change first", ""]
    lines += markdown_table(("question", "expected", "before", "after"), [_md_question(*pair) for pair in shown])
    return "\n".join(lines) + "\n"


def to_html(comparison: Comparison) -> str:
    """One page: the summary, then every question with both answers side by side. No script, nothing loaded."""
    return _PAGE.format(
        style=STYLE,
        caption=html.escape(_caption(comparison)),
        summary=html_table(HEADER, summary_cells(comparison)),
        count=len(comparison.before.rows),
        questions="\n".join(_html_question(i, *pair) for i, pair in enumerate(comparison.pairs(), start=1)),
    )


def _cells(group: str, metric: str, change: Change) -> list[str]:
    interval = f"{100 * change.low:+.1f} to {100 * change.high:+.1f}"
    numbers = [str(change.count), percent(change.before), percent(change.after), f"{100 * change.difference:+.1f}"]
    return [group, metric, *numbers, interval, change.verdict]


def _caption(comparison: Comparison) -> str:
    old, new = comparison.before.overall, comparison.after.overall
    text = (
        f"{old.count} questions, greedy answers of at most {comparison.before.max_tokens} tokens; scores out of 100; "
        "the interval of the change is a paired bootstrap over questions. "
        f"Answers cut by length: {old.num_cut} before, {new.num_cut} after."
    )
    if old.perplexity is not None and new.perplexity is not None:
        text += f" Perplexity of the expected answers: {old.perplexity:.4g} before, {new.perplexity:.4g} after."
    if old.num_failed or new.num_failed:
        text += f" FAILED answers: {old.num_failed} before, {new.num_failed} after."
    return text


def _movement(old: Row, new: Row) -> float:
    return sum(abs(new.scores[name] - value) for name, value in old.scores.items())


def _asked(row: Row) -> str:
    if len(row.prompt) == 1:
        return row.prompt[0].text
    return "\n".join(f"{message.role}: {message.text}" for message in row.prompt)


def _score_line(row: Row) -> str:
    parts = [f"{name} {percent(value)}" for name, value in row.scores.items()]
    if row.missing_facts:
        parts.append("missing: " + ", ".join(row.missing_facts))
    if row.finish_reason != "stop":
        parts.append(f"ended by {row.finish_reason}")
    return "; ".join(parts)


# --- Markdown


def _md_question(old: Row, new: Row) -> list[str]:
    texts = [_asked(old), old.expected or "facts: " + ", ".join(old.facts), old.answer, new.answer]
    asked, expected, before, after = (_shorten(text) for text in texts)
    return [asked, expected, f"{before}\n({_score_line(old)})", f"{after}\n({_score_line(new)})"]


def _shorten(text: str) -> str:
    return text if len(text) <= MARKDOWN_CHARS else text[: MARKDOWN_CHARS - 1] + "…"


# --- HTML


def _html_question(number: int, old: Row, new: Row) -> str:
    place = html.escape(" ".join(part for part in (old.where, old.domain or "", old.lang) if part))
    expected = old.expected or "facts: " + ", ".join(old.facts)
    return (
        f'<section><h3>{number} <small>{place}</small></h3><p class="asked">{html.escape(_asked(old))}</p>\n'
        f'<div class="answers">{_html_answer("expected", expected, "")}'
        f"{_html_answer('before', old.answer, _score_line(old))}"
        f"{_html_answer('after', new.answer, _score_line(new))}</div></section>"
    )


def _html_answer(title: str, text: str, scores: str) -> str:
    return (
        f'<article><h4>{title}</h4><p class="text" dir="auto">{html.escape(text)}</p>'
        f"<p><small>{html.escape(scores)}</small></p></article>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Before and after</title>
<style>{style}</style></head><body>
<h1>Before and after</h1><p>{caption}</p>
{summary}
<h2>All {count} questions</h2>
{questions}
</body></html>
"""
