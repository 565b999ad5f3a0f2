"""A bill as one picture: what each stage cost, and what each key or run of it did."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from pingjia.cost.bill import Bill
from pingjia.cost.parts import Part

MAX_BARS = 20
_COLOUR = "#2c6fbb"


def draw(bill: Bill, parts: Sequence[Part], title: str) -> bytes:
    """PNG: cost per stage, and cost per part under `title`; what is beyond MAX_BARS is added up as "others"."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = _shortened([(line.kind, float(line.cost)) for line in bill.stages if line.cost is not None])
    others = _shortened([(part.name, float(part.cost)) for part in parts])
    figure = Figure(figsize=(10, 1.5 + 0.3 * max(len(stages), len(others), 3)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _bars(left, stages, "by stage", bill.currency)
    _bars(right, others, title, bill.currency)
    figure.suptitle(f"{bill.total:f} {bill.currency} in all")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _shortened(bars: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    if len(bars) <= MAX_BARS:
        return list(bars)
    rest = bars[MAX_BARS - 1 :]
    return [*bars[: MAX_BARS - 1], (f"{len(rest)} others", sum(cost for _, cost in rest))]


def _bars(axes: Any, bars: Sequence[tuple[str, float]], title: str, currency: str) -> None:
    names = [name.replace("$", r"\$") for name, _ in bars]  # two dollars would start mathematics
    drawn = axes.barh(range(len(bars)), [cost for _, cost in bars], color=_COLOUR)
    axes.bar_label(drawn, fmt="%.4g", padding=3, fontsize=8)
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.set_xlabel(currency)
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
