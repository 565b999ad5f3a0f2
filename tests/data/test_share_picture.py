"""The picture of domain shares: well-formed, to scale, whatever the names are."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from pingjia.data.share_picture import LABELS_EN, MAX_SHOWN, draw_shares
from pingjia.data.shares import DomainPlan, plan_domains

SVG = "{http://www.w3.org/2000/svg}"


def plan(counts: dict[str, int], method: str = "down") -> DomainPlan:
    names = [name for name, count in counts.items() for _ in range(count)]
    return plan_domains(names, "balanced", method, max_repeat=2, seed=1)  # type: ignore[arg-type]


def bars(svg: str) -> list[list[float]]:
    """Widths of the bars before and after, and the place of the line, of each domain."""
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    rects = [list(group.iter(f"{SVG}rect")) for group in groups]
    return [[float(r[0].get("width", "")), float(r[1].get("width", "")), float(r[2].get("x", ""))] for r in rects]


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_bars_are_to_scale() -> None:
    (a_before, a_after, a_line), (b_before, b_after, b_line) = bars(draw_shares(plan({"a": 30, "b": 10})))
    assert a_before / b_before == pytest.approx(3)
    assert a_after == b_after == pytest.approx(a_before * 0.5 / 0.75, abs=0.01)
    assert a_line == b_line == pytest.approx(160 + a_after - 1.5, abs=0.01)


def test_figures_and_labels_are_told() -> None:
    told = texts(draw_shares(plan({"退货": 30, "shop": 10}), LABELS_EN))
    assert told[:3] == ["before", "after", "wanted"]
    assert told[3:] == ["退货", "75.0% → 50.0%", "shop", "25.0% → 50.0%"]
    assert "之前" in texts(draw_shares(plan({"a": 1})))


def test_weights_are_told() -> None:
    assert "75.0% → 50.0% ×0.67" in texts(draw_shares(plan({"a": 30, "b": 10}, "weights")))


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "\"&'", "\x00\x1b\x7f", "\ud800", "领域" * 50, "\u202eabc", " "]
)
def test_any_name_gives_a_picture(name: str) -> None:
    svg = draw_shares(plan({name: 3, "b": 1}))
    svg.encode()
    assert len(bars(svg)) == 2
    assert "<script" not in svg


def test_many_domains_are_cut_and_counted() -> None:
    svg = draw_shares(plan({f"d{i}": i + 1 for i in range(MAX_SHOWN + 7)}))
    assert len(bars(svg)) == MAX_SHOWN
    assert texts(svg)[-1] == "+ 7"
