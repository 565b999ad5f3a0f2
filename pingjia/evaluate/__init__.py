"""Metrics and judges over anything that satisfies Generator: scores, comparisons, dialogue quality, HTTP. No torch.

The names below load their file on first use: reading a recipe must not load numpy, jieba or matplotlib.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pingjia.evaluate.agreement import read_labelled
    from pingjia.evaluate.assessment import Side, assess
    from pingjia.evaluate.comparison import Change, Comparison, compare
    from pingjia.evaluate.dialogue import Dialogue, Question, ask, read_answers, read_questions
    from pingjia.evaluate.endpoint import Endpoint
    from pingjia.evaluate.facts import has_fact, missing_facts
    from pingjia.evaluate.judge import Judge, KeptMarks
    from pingjia.evaluate.quality import QualityReport
    from pingjia.evaluate.quality_page import save_quality
    from pingjia.evaluate.render import save_comparison, to_html, to_markdown
    from pingjia.evaluate.report import EvalReport, Group, Row, Score
    from pingjia.evaluate.run import evaluate, expected_answer, select
    from pingjia.evaluate.settings import METRICS, EvalSettings

_HOMES = {
    "agreement": ("read_labelled",),
    "assessment": ("Side", "assess"),
    "dialogue": ("Dialogue", "Question", "ask", "read_answers", "read_questions"),
    "judge": ("Judge", "KeptMarks"),
    "quality": ("QualityReport",),
    "quality_page": ("save_quality",),
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
    "Dialogue",
    "Endpoint",
    "EvalReport",
    "EvalSettings",
    "Group",
    "Judge",
    "KeptMarks",
    "QualityReport",
    "Question",
    "Row",
    "Score",
    "Side",
    "ask",
    "assess",
    "compare",
    "evaluate",
    "expected_answer",
    "has_fact",
    "missing_facts",
    "read_answers",
    "read_labelled",
    "read_questions",
    "save_comparison",
    "save_quality",
    "select",
    "to_html",
    "to_markdown",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"pingjia.evaluate.{home}"), name)
    raise AttributeError(f"module 'pingjia.evaluate' has no attribute {name!r}")
