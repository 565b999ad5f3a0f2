"""Before and after: the same questions only, paired, and shown without running what a model wrote."""

from __future__ import annotations

import io
import json
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from pingjia.errors import DataError
from pingjia.evaluate import EvalReport, EvalSettings, Row, compare, evaluate, save_comparison, to_html, to_markdown
from pingjia.evaluate.bootstrap import mean_interval
from pingjia.evaluate.figure import MAX_ROWS, draw_table
from pingjia.evaluate.render import HEADER
from pingjia.types import Message

NASTY = '<script>alert(1)</script> "&lt;" \' | `x` ![i](http://e/p.png) [a](javascript:b) $x$ http://e/\n# h\n- <b>'


def report_of(scores: list[float], *, answer: str = "a", domain: str | None = None) -> EvalReport:
    rows = [
        Row(
            (Message("user", f"q{i}"),),
            "e",
            answer,
            {"rouge_l": value},
            "stop",
            where=f"f:{i}",
            domain=domain,
            lang="zh",
        )
        for i, value in enumerate(scores)
    ]
    return EvalReport.of(rows, ["rouge_l"], max_tokens=96, seconds=1.0)


def test_a_report_compared_with_itself_is_the_same() -> None:
    report = report_of([0.1, 0.5, 0.9])
    change = compare(report, report).overall["rouge_l"]
    assert (change.difference, change.low, change.high, change.verdict) == (0.0, 0.0, 0.0, "same")


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20))
@settings(max_examples=40)
def test_difference_is_after_minus_before(pairs: list[tuple[float, float]]) -> None:
    before, after = report_of([a for a, _ in pairs]), report_of([b for _, b in pairs])
    change, back = compare(before, after).overall["rouge_l"], compare(after, before).overall["rouge_l"]
    assert change.difference == pytest.approx(change.after - change.before, abs=1e-12)
    assert change.difference == pytest.approx(-back.difference, abs=1e-12)
    assert change.num_better + change.num_worse <= change.count == len(pairs)
    assert (change.num_better, change.num_worse) == (back.num_worse, back.num_better)


def test_verdicts() -> None:
    low, high = report_of([0.1, 0.5, 0.3, 0.9] * 10), report_of([0.2, 0.6, 0.4, 1.0] * 10)
    assert compare(low, high).overall["rouge_l"].verdict == "better"
    assert compare(high, low).overall["rouge_l"].verdict == "worse"
    mixed = report_of([0.2, 0.4, 0.4, 0.8] * 10)
    assert compare(low, mixed).overall["rouge_l"].verdict == "unclear"


def test_pairing_sees_what_two_separate_intervals_cannot() -> None:
    values = [i / 40 for i in range(40)]
    before, after = report_of(values), report_of([value + 0.02 for value in values])
    _, _, high_before = mean_interval(values)
    assert after.overall.scores["rouge_l"].low < high_before  # the intervals overlap
    assert compare(before, after).overall["rouge_l"].verdict == "better"


def test_domains_and_languages_are_compared_too(ask, scripted) -> None:
    questions = [ask("你好", "你好", domain="a"), ask("hi", "hi", domain="b")]
    before = evaluate(questions, scripted(["再见", "hi"]), EvalSettings(metrics=["rouge_1"]))
    after = evaluate(questions, scripted(["你好", "bye"]), EvalSettings(metrics=["rouge_1"]))
    comparison = compare(before, after)
    assert comparison.domains["a"]["rouge_1"].difference == 1.0
    assert comparison.domains["b"]["rouge_1"].difference == -1.0
    assert comparison.languages["en"]["rouge_1"].difference == -1.0
    rows = [(row["group"], row["metric"], row["verdict"]) for row in comparison.table()]
    assert rows == [
        ("overall", "rouge_1", "unclear"),
        ("domain a", "rouge_1", "better"),
        ("domain b", "rouge_1", "worse"),
        ("language en", "rouge_1", "worse"),
        ("language zh", "rouge_1", "better"),
    ]


def test_reports_that_cannot_be_compared(ask, scripted) -> None:
    def run(prompt: str, response: str, *, facts: tuple[str, ...] = (), **fields) -> EvalReport:
        return evaluate([ask(prompt, response, facts=facts, where="f:1")], scripted(["a"]), EvalSettings(**fields))

    base = run("q", "a")
    for other, message in [
        (run("other", "a"), "question 1 differs: 'f:1'"),
        (run("q", "b"), "question 1 differs"),
        (run("q", "a", facts=("a",)), "question 1 differs"),
        (run("q", "a", metrics=["rouge_1"]), "different metrics"),
        (run("q", "a", max_tokens=9), "different max_tokens: 96 before, 9 after"),
        (report_of([0.1, 0.2]), "asked 1 and 2 questions"),
    ]:
        with pytest.raises(DataError, match=re.escape(message)):
            compare(base, other)


def test_scores_of_two_encoders_are_not_compared() -> None:
    ours, theirs = (replace(report_of([0.1]), encoder=name) for name in ("minilm", "minilm, layer 3"))
    with pytest.raises(DataError, match="different encoder: minilm before, minilm, layer 3 after; use one"):
        compare(ours, theirs)


def test_the_dict_is_json_and_holds_both_answers(ask, scripted) -> None:
    questions = [ask("q", "right", facts=("right",))]
    before, after = (evaluate(questions, scripted([text]), EvalSettings()) for text in ("wrong", "right"))
    found = json.loads(json.dumps(compare(before, after).to_dict()))
    question = found["questions"][0]
    assert (question["before"]["answer"], question["after"]["answer"]) == ("wrong", "right")
    assert (question["before"]["missing_facts"], question["after"]["missing_facts"]) == (["right"], [])
    assert found["overall"]["exact_facts"]["difference"] == 1.0


# --- what it looks like


class Page(HTMLParser):
    """Every tag, every attribute name, and the text of every element with class "text"."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._inside = ("class", "text") in attrs
        if self._inside:
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


PAGE_TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "h4", "p", "small", "table", "thead",
             "tbody", "tr", "th", "td", "section", "div", "article"}  # fmt: skip


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_html_shows_any_answer_as_text(answer: str) -> None:
    before, after = report_of([0.1], answer=answer, domain=answer), report_of([0.2], answer=NASTY, domain=answer)
    page = Page(to_html(compare(before, after)))
    assert page.tags == PAGE_TAGS
    assert page.attributes <= {"lang", "charset", "http-equiv", "content", "name", "class", "dir"}
    assert [text.replace("\r\n", "\n").replace("\r", "\n") for text in page.texts] == [
        "e", answer.replace("\r\n", "\n").replace("\r", "\n"), NASTY
    ]  # fmt: skip


def test_html_loads_nothing() -> None:
    html = to_html(compare(report_of([0.1]), report_of([0.2])))
    assert "default-src 'none'" in html
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_markdown_shows_any_answer_as_text(answer: str) -> None:
    before, after = (
        report_of([0.1], answer=answer + NASTY, domain=answer),
        report_of([0.2], answer=NASTY, domain=answer),
    )
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(to_markdown(compare(before, after)))
    tags = set(re.findall(r"<\s*/?\s*([a-z0-9]+)", html))
    assert tags <= {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "br", "wbr"}
    assert html.count("<tr>") == 1 + 2 + 1 + 1  # both headers, overall and one domain, one question


def test_markdown_shows_the_largest_changes_first() -> None:
    before, after = report_of([0.5] * 30), report_of([0.5] * 29 + [0.9])
    text = to_markdown(compare(before, after))
    assert "20 of 30 questions" in text
    assert text.index("q29") < text.index("q0")


def test_all_files_are_written(tmp_path: Path) -> None:
    before, after = report_of([0.1, 0.2], domain="售后"), report_of([0.9, 0.8], domain="售后")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of glyphs it cannot draw
        paths = save_comparison(compare(before, after), tmp_path / "out")
    assert [path.name for path in paths] == [
        "comparison.md", "comparison.html", "comparison_table.png", "comparison_bars.png"
    ]  # fmt: skip
    bars = Image.open(paths[3]).convert("RGB")
    colours = {colour for _, colour in bars.getcolors(maxcolors=1 << 24)}
    assert (0x1F, 0x6F, 0xEB) in colours
    assert (0x9A, 0xA7, 0xB4) in colours


def test_a_very_long_table_stays_a_picture() -> None:
    cells = [[f"domain {i}", "rouge_l", "1", "0.0", "0.0", "+0.0", "+0.0 to +0.0", "same"] for i in range(500)]
    limit = Image.open(io.BytesIO(draw_table(HEADER, cells[: MAX_ROWS + 1]))).height
    assert Image.open(io.BytesIO(draw_table(HEADER, cells))).height == limit
