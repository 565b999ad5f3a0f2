"""The page on evaluation is true."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from pingjia.evaluate import METRICS, EvalSettings, has_fact
from pingjia.recipe import Section, build

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "eval.md").read_text(encoding="utf-8")


class Wrapper(Section):
    eval: EvalSettings


def test_the_recipe_section_loads_and_its_defaults_are_ours() -> None:
    (section,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    found = build(yaml.safe_load(section), Wrapper, flat=()).eval
    assert (found.max_tokens, found.metrics) == (EvalSettings().max_tokens, EvalSettings().metrics)


def test_every_metric_is_on_the_page() -> None:
    rows = " ".join(re.findall(r"^\| (`.*?) \|", PAGE, flags=re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows)) == set(METRICS)


def test_the_files_it_names_are_written_under_these_names() -> None:
    source = (Path(__file__).resolve().parents[2] / "pingjia" / "evaluate" / "render.py").read_text(encoding="utf-8")
    for name in ("comparison.md", "comparison.html", "comparison_table.png", "comparison_bars.png"):
        assert f"`{name}`" in PAGE
        assert f'"{name}"' in source


def test_what_it_says_of_facts() -> None:
    assert has_fact("1，000", "1000")
    assert has_fact("product", "pro")
    assert not any(has_fact(*pair) for pair in [("136个月", "36个月"), ("36.5个月", "36"), ("三十六个月", "六个月")])
    assert not has_fact("约: -5元", "5元")
    assert not has_fact("36", "三十六")
