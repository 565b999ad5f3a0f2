"""Metrics over anything that satisfies Generator: scores, before/after comparisons, an HTTP generator. No torch.

The names below load their file on first use: reading a recipe must not load numpy, jieba or matplotlib.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pingjia.evaluate.comparison import Change, Comparison, compare
    from pingjia.evaluate.endpoint import Endpoint
    from pingjia.evaluate.facts import has_fact, missing_facts
    from pingjia.evaluate.render import save_comparison, to_html, to_markdown
    from pingjia.evaluate.report import EvalReport, Group, Row, Score
    from pingjia.evaluate.run import evaluate, expected_answer, select
    from pingjia.evaluate.settings import METRICS, EvalSettings

_HOMES = {
    "comparison": ("Change", "Comparison", "compare"),
    "endpoint": ("Endpoint",),
    "facts": ("has_fact", "missing_facts"),
    "render": ("save_comparison", "to_html", "to_markdown"),
    "report": ("EvalReport", "Group", "Row", "Score"),
    "run": ("evaluate", "expected_answer", "select"),
    "settings": ("METRICS", "EvalSettings"),
}
__all__ = [
    "METRICS",
    "Change",
    "Comparison",
    "Endpoint",
    "EvalReport",
    "EvalSettings",
    "Group",
    "Row",
    "Score",
    "compare",
    "evaluate",
    "expected_answer",
    "has_fact",
    "missing_facts",
    "save_comparison",
    "select",
    "to_html",
    "to_markdown",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"pingjia.evaluate.{home}"), name)
    raise AttributeError(f"module 'pingjia.evaluate' has no attribute {name!r}")
