"""Pictures of a report as inline SVG. Horizontal places are in percent and vertical ones in pixels, so that a picture
fills any width while its letters keep their size. What a picture shows also stands beside it as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10

from pingjia.data.histogram import Histogram
from pingjia.data.report_html import Html, Words, join, tag

MAX_BARS = 48
_TOP, _HEIGHT, _FOOT = 52, 150, 26  # of the bars, below labels and above the axis
_BOTTOM = _TOP + _HEIGHT


@dataclass(frozen=True, slots=True)
class Line:
    """A vertical line with a label. `kind` is its CSS class."""

    value: float
    label: str
    kind: str = "quantile"


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn. Bars below `bad_to` are of rows that are left out. `whole`: of whole numbers. `upto`: where the
    axis ends, if not with the bars."""

    bars: Histogram
    label: Words
    lines: Sequence[Line] = ()
    bad_to: float | None = None
    whole: bool = True
    upto: float | None = None


def histogram(chart: Chart) -> Html:
    """Bars over a linear axis."""
    h = chart.bars
    axis = _Axis(h.edges[0], h.edges[-1] if chart.upto is None else max(chart.upto, h.edges[-1]))
    most = max(h.counts, default=0) or 1
    parts = [tag("g", _bars(chart, axis, most), class_="solid"), _grid(most)]
    parts += [tag("line", x1=0, x2="100%", y1=_BOTTOM, y2=_BOTTOM, class_="axis"), _ticks(axis)]
    parts += [_line(line, axis, 12 + 13 * i) for i, line in enumerate(chart.lines)]
    return _picture(parts, _BOTTOM + _FOOT, chart.label, "histogram")


def _picture(parts: Iterable[Html], height: int, label: Words, kind: str) -> Html:
    return tag("svg", *parts, class_=f"chart {kind}", height=height, role="img", aria_label=" / ".join(label))


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float

    def at(self, value: float) -> float:
        """Percent of the width."""
        return 100 * min(max((value - self.low) / ((self.high - self.low) or 1), 0.0), 1.0)


def _bars(chart: Chart, axis: _Axis, most: int) -> list[Html]:
    h = chart.bars
    return [
        _bar_of(chart, axis, low, high, tag("title", f"{_span(chart, low, high)}: {count:,}"), count / most)
        for (low, high), count in zip(pairwise(h.edges), h.counts, strict=True)
        if count
    ]


def _bar_of(chart: Chart, axis: _Axis, low: float, high: float, title: Html, share: float) -> Html:
    left, right, height = axis.at(low), axis.at(high), max(1.5, _HEIGHT * share)
    is_bad = chart.bad_to is not None and high <= chart.bad_to
    gap = min(0.25, (right - left) / 5)
    return tag(
        "rect",
        title,
        x=_pct(left + gap / 2),
        width=_pct(right - left - gap),
        y=f"{_BOTTOM - height:.1f}",
        height=f"{height:.1f}",
        class_="bad" if is_bad else None,
    )


def _span(chart: Chart, low: float, high: float) -> str:
    if not chart.whole:
        return f"{low:g}–{high:g}"
    first, last = ceil(low), ceil(high) - 1
    return f"{first:,}" if first >= last else f"{first:,}–{last:,}"


def _pct(value: float) -> str:
    return f"{value:.2f}%"


def _grid(most: int) -> Html:
    """Lines with round counts on them; they lie over the bars, so that the counts can be read."""
    lines = []
    for value in _round_values(0, most, 4)[1:]:
        y = _BOTTOM - _HEIGHT * value / most
        lines.append(tag("line", x1=0, x2="100%", y1=f"{y:.1f}", y2=f"{y:.1f}"))
        lines.append(tag("text", f"{value:,.0f}", x=0, y=f"{y - 3:.1f}"))
    return tag("g", lines, class_="grid")


def _ticks(axis: _Axis) -> Html:
    values = _round_values(axis.low, axis.high, 6)
    return tag("g", [_tick(axis.at(value), f"{value:,g}" if value < 1 else f"{value:,.10g}") for value in values])


def _tick(x: float, text: str) -> Html:
    mark = tag("line", x1=_pct(x), x2=_pct(x), y1=_BOTTOM, y2=_BOTTOM + 4, class_="axis")
    return join(mark, tag("text", text, x=_pct(x), y=_BOTTOM + 18, text_anchor=_anchor(x)))


def _anchor(x: float) -> str:
    return "start" if x < 4 else "end" if x > 96 else "middle"


def _round_values(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about so many, from low to high."""
    rough = (high - low) / about or 1
    power = 10.0 ** floor(log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    if float(low).is_integer() and high > 2:
        step = max(step, 1.0)
    return [round(i * step, 10) for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def _line(line: Line, axis: _Axis, y: int) -> Html:
    x = axis.at(line.value)
    is_left = x > 60
    text = tag("text", line.label, x=_pct(x), dx=-5 if is_left else 5, y=y, text_anchor="end" if is_left else "start")
    return tag("g", tag("line", x1=_pct(x), x2=_pct(x), y1=y - 9, y2=_BOTTOM), text, class_=line.kind)


# ---- bars


def bar(parts: Sequence[tuple[str, float]], label: Words | None = None, height: int = 10) -> Html:
    """One bar of parts: (CSS class, share of the width). Without a label it is only decoration beside a number."""
    rects, left = [tag("rect", x=0, width="100%", height=height, class_="track")], 0.0
    for kind, share in parts:
        width = 100 * min(max(share, 0.0), 1.0)
        rects.append(tag("rect", x=_pct(left), width=_pct(width), height=height, class_=kind))
        left += width
    if label is None:
        return tag("svg", rects, class_="bar", height=height, aria_hidden="true")
    return tag("svg", rects, class_="bar", height=height, role="img", aria_label=" / ".join(label))


def gauge(before: float | None, after: float, minimum: float | None, label: Words) -> Html:
    """A share of 1: where it was, where it is, and where it has to be."""
    parts = [
        tag("rect", x=0, width="100%", y=16, height=16, class_="track"),
        tag("rect", x=0, width=_pct(100 * after), y=16, height=16, class_="solid"),
    ]
    if before is not None:
        parts.append(tag("line", x1=_pct(100 * before), x2=_pct(100 * before), y1=14, y2=34, class_="was"))
    if minimum is not None:
        x = 100 * minimum
        parts.append(tag("line", x1=_pct(x), x2=_pct(x), y1=10, y2=38, class_="least"))
        parts.append(tag("text", f"≥ {minimum:.0%}", x=_pct(x), y=8, text_anchor=_anchor(x)))
    return _picture(parts, 40, label, "gauge")


def funnel_step(before: float, after: float) -> Html:
    """A slice of a funnel: as wide above as what came in, as wide below as what went on. Shares of the widest."""
    top, bottom = 50 * min(before, 1), 50 * min(after, 1)
    kept = min(top, bottom)
    lost = f"{50 - top:.2f},0 {50 + top:.2f},0 {50 + bottom:.2f},40 {50 - bottom:.2f},40"
    core = f"{50 - kept:.2f},0 {50 + kept:.2f},0 {50 + kept:.2f},40 {50 - kept:.2f},40"
    kind = "lost" if before >= after else "more"
    shapes = [tag("polygon", points=lost, class_=kind), tag("polygon", points=core, class_="core")]
    return tag("svg", shapes, viewBox="0 0 100 40", preserveAspectRatio="none", class_="funnel", aria_hidden="true")
