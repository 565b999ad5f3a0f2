"""The page: whole, quiet, in two languages, and with the numbers of the report and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.data.histogram import Histogram
from pingjia.data.rendered import Piece
from pingjia.data.report import DataReport, Repeat, Rule, Sample, Scores, Share, Stage
from pingjia.data.report_page import render_page
from pingjia.data.report_remarks import remarks

EVIL = '<script>alert("x")</script>&amp;{}</title></style>'
VOID = frozenset({"meta", "br", "link", "input"})


class Reader(HTMLParser):
    """Collects what a page holds; fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.values: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.text += data
        if self.open and self.open[-1] == "data":
            self.values.append((str(self.tags[-1][1]["value"]), data))

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


class Counter:
    """Numbers that no other field has, so that a mix-up shows."""

    def __init__(self) -> None:
        self.last = 100_003

    def __call__(self) -> int:
        self.last += 7919
        return self.last


def filled(text: str = "文本") -> DataReport:
    n = Counter()
    lengths = Histogram.whole(1024)
    lengths.add(range(10, 900, 7))
    scores = Scores(0.8, Histogram.even(0, 1, 50), n())
    scores.histogram.add([0.5, 0.9, 0.95])
    sample = Sample(f"{text}:3", text, text)
    return DataReport(
        title=text,
        created="2026-11-24T10:00:00+00:00",
        files=[(f"data/{text}.jsonl", n())],
        model=text,
        cutoff_len=1024,
        settings={"personal": {"action": "report", text: text}, text: [text]},
        num_rows=n(),
        num_kept=n(),
        num_written=n(),
        num_rejected=n(),
        num_changed=n(),
        num_made=n(),
        num_other_domains=n(),
        stages=[Stage("read", n(), n()), Stage(text, n(), n())],
        lengths=lengths,
        zh_before=0.65,
        zh_after=0.712,
        min_zh_share=0.7,
        languages=[Share("zh", n(), n(), 1, n(), n()), Share(text, n(), n(), 1, n(), n())],
        domains=[Share(text, n(), n(), 0.5, 0, 0, 0.5), Share("-", n(), n(), 1.5, 0, 0, 0.5)],
        rejects={"leak": Rule(n(), [sample]), text: Rule(n(), [sample])},
        changes={"split": Rule(n(), [sample])},
        personal={"phone": n(), text: n()},
        repeats=[Repeat("leak", f"{text}:1", text, f"{text}:2", text)],
        quality={"reference": scores, text: replace(scores, num_below=n())},
        made={"synonyms": n(), text: n()},
        refused={"synonyms: no_synonym": n(), f"{text}: {text}": n()},
        made_samples=[(text, text)],
        examples=[
            [Piece("<|user|>", False, True), Piece(text, False), Piece("\n", False), Piece("答", True, False, 3)]
        ],
        notes=[text],
        seconds=2.5,
        inputs="abc",
    )


def numbers_of(value: Any) -> Iterator[float]:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers_of(item)


# ---- a page that is whole and quiet


def test_the_page_fetches_nothing_and_runs_only_its_own_script() -> None:
    page = render_page(filled(EVIL))
    reader = read(page)
    links = [a[key] or "" for _, a in reader.tags for key in ("src", "href", "action", "srcset", "data") if key in a]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not re.search(r"https?://|url\(|@import", page)
    assert len(reader.named("script")) == 1
    policy = next(a["content"] for a in reader.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy


@pytest.mark.parametrize("text", [EVIL, "javascript:alert(1)", '" onload="alert(1)', "'><img src=x onerror=alert(1)>"])
def test_user_texts_are_text(text: str) -> None:
    reader = read(render_page(filled(text)))
    assert reader.text.count(text[:32]) >= 15
    assert not [a for _, a in reader.tags for key in a if key.startswith("on")]
    assert not reader.named("img")
    assert len(reader.named("style")) == len(reader.named("title")) - len(_chart_titles(reader)) == 1


def _chart_titles(reader: Reader) -> list[int]:
    return [i for i, (tag, _) in enumerate(reader.tags) if tag == "title" and reader.tags[i - 1][0] == "rect"]


@given(st.text(max_size=40))
@settings(max_examples=40)
def test_any_text_gives_a_page_that_can_be_written(text: str) -> None:
    page = render_page(filled(text + "\ud83d\x00\u202e"))
    read(page)
    assert not re.search("[\x00-\x08\u202e]", page)
    page.encode("utf-8")


def test_hostile_texts_do_not_make_it_huge() -> None:
    text = "&\"'<🧊"
    long = text * 20_000
    report = filled(long)
    rules = {f"{text * 30}{i}": Rule(9, [Sample(long, long, long)] * 5) for i in range(90)}
    shares = [Share(f"{text * 99}{i}", i, i) for i in range(500)]
    report = replace(
        report,
        rejects=rules,
        changes=rules,
        domains=shares,
        languages=shares,
        files=[(long, 1)] * 999,
        settings={f"{text * 99}{i}": long for i in range(999)},
        personal={f"{text * 99}{i}": 1 for i in range(999)},
        refused={f"{text * 99}{i}": 1 for i in range(999)},
        made={f"{text * 99}{i}": 1 for i in range(999)},
        quality={f"{text * 99}{i}": Scores(0.8, report.quality["reference"].histogram) for i in range(99)},
        stages=[Stage(long, 9, 9)] * 999,
        repeats=report.repeats * 999,
        made_samples=report.made_samples * 999,
        examples=[[Piece(long, bool(i % 2)) for i in range(9999)]] * 9,
        notes=[long] * 999,
    )
    size = len(render_page(report).encode())  # outside the assertion, which would show the report
    assert size < 1_000_000


def test_nothing_at_all_still_gives_a_page() -> None:
    reader = read(render_page(DataReport()))
    assert "没有读到任何行" in reader.text
    assert "No row was read" in reader.text


# ---- the numbers


def test_every_number_of_the_report_is_on_the_page_and_no_other() -> None:
    report = json.loads(json.dumps(filled().to_dict()))
    values = [float(value) for value, _ in read(render_page(filled())).values]
    mine = {float(n) for n in numbers_of(report)} | {float(filled().quality["reference"].histogram.num)}
    assert [v for v in values if v not in mine] == []
    unseen = {n for n in numbers_of(report) if n > 100_000} - {int(v) for v in values}
    assert unseen == {report["stages"][0]["num_in"], report["stages"][1]["num_in"]}  # drawn; and shown as a change


def test_a_number_reads_as_it_is() -> None:
    for value, shown in read(render_page(filled())).values:
        assert float(shown.replace(",", "")) == pytest.approx(float(value))


def test_shares_are_those_of_the_rows() -> None:
    report = DataReport(
        num_rows=400,
        num_kept=300,
        num_rejected=100,
        zh_before=0.5,
        zh_after=0.69996,
        min_zh_share=0.7,
        languages=[Share("zh", 300, 225), Share("en", 100, 75)],
        domains=[Share("a", 100, 100, 3.0), Share("b", 300, 300, 1.0)],
    )
    text = read(render_page(report)).text
    assert text.count("75.0%") >= 3  # kept; Chinese rows before and after
    assert "100 50.0%" in text  # domain a, by weight
    assert "69.996%" in text  # not 70.0%, which it misses


def test_changes_have_their_sign() -> None:
    text = read(render_page(DataReport(num_rows=9, stages=[Stage("rows", 9, 5), Stage("augment", 5, 8)]))).text
    assert "5 -4" in text
    assert "8 +3" in text


# ---- what a person sees


def test_everything_is_said_in_both_languages() -> None:
    reader = read(render_page(filled()))
    zh, en = (sum(a.get("class") == name for a in reader.named("span")) for name in ("zh", "en"))
    assert zh == en > 40
    for text in ("完全不用", "与留出集重合", "Leaks into held-out rows", "个人信息", "Personal data", "模型学的是什么"):
        assert (text in reader.text) is (text != "完全不用")


def test_headings_tables_and_pictures_can_be_read_aloud() -> None:
    reader = read(render_page(filled()))
    levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert all("scope" in a for a in reader.named("th"))
    assert len(reader.named("caption")) == len(reader.named("table"))
    assert all(a.get("aria-hidden") == "true" or a.get("aria-label") for a in reader.named("svg"))
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in reader.named("a")} <= {f"#{name}" for name in ids}


def test_tokens_show_what_is_learnt() -> None:
    pieces = [
        Piece("<|user|>", False, True),
        Piece("问\n", False),
        Piece("答", True, False, 2),
        Piece("</s>", True, True),
    ]
    page = render_page(DataReport(num_rows=1, num_kept=1, examples=[pieces]))
    tokens = page.partition('class="tokens"')[2].partition("</figure>")[0]
    assert '<i class="special">&lt;|user|&gt;</i><i>问<u>⏎</u>\n</i><b class="learnt">答</b>' in tokens
    assert '<b class="learnt special">&lt;/s&gt;</b>' in tokens
    assert "5 tokens, 3 learnt" in tokens


def test_a_long_example_shows_its_beginning_and_its_end() -> None:
    pieces = [Piece(f"t{i} ", i > 900) for i in range(1000)]
    text = read(render_page(DataReport(num_rows=1, num_kept=1, examples=[pieces]))).text
    assert "t0 " in text
    assert "t999 " in text
    assert "t500 " not in text
    assert "… 520 …" in text
    assert "1,000 tokens, 99 learnt" in text


def test_what_was_reworded_is_marked() -> None:
    page = render_page(DataReport(made={"synonyms": 1}, made_samples=[("How long is it?", "How far is it?")]))
    assert "<del>long</del>" in page
    assert "<ins>far</ins>" in page


def test_rows_that_are_equal_are_shown_once() -> None:
    twice = [Repeat("duplicate", "a:2", "same", "a:1", "same"), Repeat("near_duplicate", "a:4", "one", "a:3", "two")]
    report = DataReport(num_rows=4, rejects={"duplicate": Rule(1), "near_duplicate": Rule(1)}, repeats=twice)
    text = read(render_page(report)).text
    assert text.count("same") == 1
    assert "a:2 = a:1" in text
    assert "<del>one</del>" in render_page(report)


# ---- worth a look

REPORTED = {"personal": {"action": "report"}}


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (DataReport(), "No row was read"),
        (DataReport(num_rows=3, num_rejected=3), "All 3 rows were left out"),
        (DataReport(num_rows=3, num_kept=3, zh_after=0.69996, min_zh_share=0.7), "69.996% of the letters, below 70%"),
        (
            DataReport(num_rows=9, num_kept=9, personal={"phone": 2}, settings={"personal": {"action": "report"}}),
            "2 times",
        ),
        (DataReport(num_rows=9, num_kept=8, rejects={"leak": Rule(1)}), "1 rows repeated held-out rows"),
        (DataReport(num_rows=9, num_kept=6, rejects={"length": Rule(3)}), "“Too long” left out 33.3% of the rows"),
        (
            DataReport(num_rows=9, num_kept=9, domains=[Share("a", 9, 9, wanted=0.5)]),
            "Domain “a” has 100.0%, wanted 50.0%",
        ),
    ],
)
def test_what_is_worth_a_look(report: DataReport, words: str) -> None:
    assert words in " ".join(en for _, en in remarks(report))


def test_a_good_data_set_needs_no_remark() -> None:
    rejects = {"length": Rule(1), "balance": Rule(5)}  # as many as were asked for
    report = DataReport(num_rows=10, num_kept=4, zh_after=0.7, min_zh_share=0.7, rejects=rejects)
    assert remarks(report) == []
    assert "值得一看" not in render_page(report)
