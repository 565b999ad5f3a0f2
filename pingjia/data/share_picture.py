"""Domains before and after balancing as one SVG, which stands alone in a file or inside a page. No library draws it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from pingjia.data.shares import DomainPlan, DomainRow

LABELS_ZH = ("之前", "之后", "目标")
LABELS_EN = ("before", "after", "wanted")
MAX_SHOWN = 40
_LABEL, _BARS, _FIGURES = 160, 360, 130  # widths
_ROW, _HEAD = 34, 30  # heights
_COLORS = ("#9aa5b1", "#2f7d6b", "#c2410c")  # told apart also by those who see no red or no green, and in grey


def draw_shares(plan: DomainPlan, labels: Sequence[str] = LABELS_ZH) -> str:
    """SVG text: for each domain a bar of its share before and after, and a line at the share that was wanted.

    The largest `MAX_SHOWN` domains after balancing; the others are counted below. `labels`: before, after, wanted.
    Text takes the colour of the page. Names are escaped.
    """
    rows = sorted(plan.table, key=lambda row: (-max(row.share_after, row.share_before), row.name))
    shown, num_others = rows[:MAX_SHOWN], len(rows[MAX_SHOWN:])
    most = max((max(r.share_before, r.share_after, r.share_wanted) for r in shown), default=0) or 1
    width = _LABEL + _BARS + _FIGURES
    height = _HEAD + _ROW * (len(shown) + bool(num_others))
    body = [*_legend(labels), *(part for i, row in enumerate(shown) for part in _bars(row, _HEAD + _ROW * i, most))]
    if num_others:
        body.append(_text(0, height - 12, f"+ {num_others}"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="13" fill="currentColor">{"".join(body)}</svg>'
    )


def _legend(labels: Sequence[str]) -> Iterator[str]:
    for number, (label, color) in enumerate(zip(labels, _COLORS, strict=True)):
        x = _LABEL + number * _BARS / 3
        yield f'<rect x="{x:g}" y="6" width="{3 if number == 2 else 12}" height="12" fill="{color}"/>'
        yield _text(x + 18, 17, label)


def _bars(row: DomainRow, y: int, most: float) -> Iterator[str]:
    told = f"{row.name}: {row.num_before:,} ({row.share_before:.1%}) → {row.num_after:,} ({row.share_after:.1%})"
    yield f"<g><title>{_escaped(told)}</title>{_text(0, y + 19, _short(row.name))}"
    for number, share in enumerate((row.share_before, row.share_after)):
        width = _BARS * share / most
        yield f'<rect x="{_LABEL}" y="{y + 3 + 12 * number}" width="{width:.2f}" height="11" fill="{_COLORS[number]}"/>'
    x = _LABEL + _BARS * row.share_wanted / most
    yield f'<rect x="{x - 1.5:.2f}" y="{y + 1}" width="3" height="27" fill="{_COLORS[2]}"/>'
    weight = f" ×{row.weight:.2f}" if row.weight != 1 else ""
    yield _text(_LABEL + _BARS + 10, y + 19, f"{row.share_before:.1%} → {row.share_after:.1%}{weight}") + "</g>"


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:g}" y="{y:g}">{_escaped(text)}</text>'


def _short(name: str) -> str:
    """At most what the column holds; a Chinese character is as wide as two Latin ones."""
    width, kept = 0, ""
    for character in name:
        width += 1 if character.isascii() else 2
        if width > 21:
            return kept + "…"
        kept += character
    return kept


def _escaped(text: str) -> str:
    """Without what XML cannot hold: control characters and halves of surrogate pairs."""
    return escape("".join(c if c.isprintable() else "\ufffd" for c in text))
