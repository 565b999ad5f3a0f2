"""The before/after pictures as PNG bytes. matplotlib is loaded when the first one is drawn, without a display."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

from pingjia.evaluate.comparison import Change

BEFORE_COLOUR, AFTER_COLOUR = "#9aa7b4", "#1f6feb"
DPI = 150
MAX_ROWS = 60  # a picture of more rows is longer than viewers show; the Markdown table has all
_CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",  # one file serves all CJK languages; matplotlib often lists it under this name alone
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Heiti SC",
    "Arial Unicode MS",
)


def draw_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> bytes:
    """The table as a PNG. A text that no font here can draw (Chinese) is replaced by "domain N": the N-th such name,
    in the order of the rows."""
    shown = _drawable(cells[:MAX_ROWS])
    if len(cells) > MAX_ROWS:
        shown.append([f"... {len(cells) - MAX_ROWS} more rows", *[""] * (len(header) - 1)])
    figure = _figure(width=0.95 * len(header), height=0.5 + 0.32 * (len(shown) + 1))
    axes = figure.subplots()
    axes.axis("off")
    table = axes.table(cellText=shown, colLabels=list(header), loc="center", cellLoc="left", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.5)
    table.auto_set_column_width(list(range(len(header))))
    for (row, column), cell in table.get_celld().items():
        if row == 0:
            cell.set_text_props(weight="bold")
        elif column == 0:
            cell.set_text_props(family=_families())
    return _png(figure)


def draw_bars(changes: Mapping[str, Change]) -> bytes:
    """Mean scores before and after, side by side per metric, out of 100, as a PNG."""
    figure = _figure(width=max(4.5, 1.8 * len(changes)), height=3.6)
    axes = figure.subplots()
    places = list(range(len(changes)))
    for shift, colour, name in ((-0.2, BEFORE_COLOUR, "before"), (0.2, AFTER_COLOUR, "after")):
        heights = [100 * getattr(change, name) for change in changes.values()]
        bars = axes.bar([place + shift for place in places], heights, width=0.38, color=colour, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=9)
    axes.set_xticks(places, list(changes))
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("score out of 100")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _png(figure)


def _figure(*, width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def _drawable(cells: Sequence[Sequence[str]]) -> list[list[str]]:
    known = _glyphs()
    names: dict[str, str] = {}

    def shown(text: str) -> str:
        if all(ord(c) in known for c in text):
            return _literal(text)
        kind = text.split(" ", 1)[0]
        return names.setdefault(text, f"{kind if kind.isascii() else 'name'} {len(names) + 1}")

    return [[shown(cell) for cell in row] for row in cells]


def _literal(text: str) -> str:
    return text.replace("$", r"\$")  # two dollars would start mathematics


@functools.cache
def _families() -> list[str]:
    """A Chinese font that is installed here, if any, then matplotlib's own."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [*[name for name in _CHINESE_FONTS if name in installed][:1], "DejaVu Sans"]


@functools.cache
def _glyphs() -> frozenset[int]:
    """Code points that some font of `_families` can draw."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(point for name in _families() for point in get_font(findfont(name)).get_charmap())
