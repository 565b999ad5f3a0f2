"""The report: counts that are exact, a page that is whole, and nothing in it that its reader did not ask for."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.chat.tokenizer import Tokenizer
from pingjia.data.histogram import Histogram
from pingjia.data.report import (
    DataReport,
    Piece,
    Rule,
    Sample,
    Scores,
    Share,
    Stage,
    load_report,
    render_example,
    summary_lines,
)
from pingjia.data.report_page import render_page
from pingjia.types import Encoded, Example, Message

EVIL = '<script>alert("x")</script>&amp;{}'


def filled() -> DataReport:
    lengths = Histogram.round(1024, 48)
    lengths.add(range(10, 900, 7))
    scores = Scores(0.8, Histogram.even(0, 1, 50), 3)
    scores.histogram.add([0.5, 0.9, 0.95])
    return DataReport(
        title=f"{EVIL}.jsonl",
        created="2026-11-24T10:00:00+00:00",
        files=[(f"{EVIL}.jsonl", 12345)],
        model="smollm2",
        cutoff_len=1024,
        settings={"personal": {"action": "mask"}},
        num_rows=1000,
        num_kept=870,
        num_written=870,
        num_rejected=150,
        num_changed=12,
        num_made=20,
        stages=[Stage("read", 1000, 1000), Stage("duplicates", 1000, 870)],
        lengths=lengths,
        zh_before=0.65,
        zh_after=0.712,
        min_zh_share=0.7,
        languages=[Share("zh", 700, 650), Share("en", 300, 220)],
        domains=[Share(EVIL, 600, 435, 0.5), Share("-", 400, 435, 1.5)],
        rejects={"duplicate": Rule(130, [Sample(f"{EVIL}:3", EVIL, EVIL)]), EVIL: Rule(20)},
        changes={"split": Rule(12)},
        personal={"phone": 4},
        quality={"reference": scores},
        made={"synonyms": 20},
        refused={"synonyms: no_synonym": 31},
        made_samples=[(EVIL, EVIL)],
        examples=[[Piece("⟨1⟩", False, True), Piece(EVIL + "\n", False), Piece("答", True)]],
        notes=[EVIL],
        seconds=2.5,
        inputs="abc",
    )


# ---- histograms

NUMBERS = st.lists(st.floats(0, 1000), max_size=80)


@given(NUMBERS, NUMBERS, st.integers(1, 60))
def test_counting_in_pieces_equals_counting_at_once(left: list[float], right: list[float], num_bins: int) -> None:
    whole, pieces = Histogram.round(1000, num_bins), Histogram.round(1000, num_bins)
    whole.add([*left, *right])
    pieces.add(left)
    pieces.add(np.array(right))
    assert (whole.counts, whole.low, whole.high) == (pieces.counts, pieces.low, pieces.high)
    assert whole.num == len(left) + len(right)


@given(st.lists(st.integers(0, 999), min_size=1, max_size=80), st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_a_quantile_is_right_to_within_a_bin(numbers: list[int], share: float) -> None:
    h = Histogram.round(1000, 50)
    h.add(numbers)
    exact = sorted(numbers)[max(0, int(np.ceil(share * len(numbers))) - 1)]
    found = h.quantile(share)
    assert found is not None
    assert abs(found - exact) <= h.edges[1] - h.edges[0]


@given(st.integers(1, 10**7), st.integers(1, 100))
def test_bins_read_well_and_reach_far_enough(high: int, num_bins: int) -> None:
    h = Histogram.round(high, num_bins)
    assert len(h.counts) <= num_bins
    assert h.edges[-1] >= high
    assert re.fullmatch(r"[125]0*", f"{h.edges[1]:.0f}")


def test_what_lies_outside_is_counted_at_the_ends() -> None:
    h = Histogram.even(0, 1, 4)
    h.add([-1, 0.3, 1.0, 7])
    assert h.counts == [1, 1, 0, 2]
    assert (h.low, h.high) == (-1, 7)
    assert Histogram.even(0, 1, 4).quantile(0.5) is None


# ---- the same facts twice


def test_json_and_back() -> None:
    report = filled()
    again = DataReport.of(json.loads(json.dumps(report.to_dict())))
    assert again == report


def test_a_report_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert load_report(tmp_path / "no.json") is None
    (tmp_path / "a.json").write_text("{")
    assert load_report(tmp_path / "a.json") is None
    (tmp_path / "b.json").write_text('{"files": 3}')
    assert load_report(tmp_path / "b.json") is None


class Reader(HTMLParser):
    """Collects text and attributes; fails on tags that do not match."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts = 0
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "action", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_whole_and_asks_for_nothing() -> None:
    page = render_page(filled())
    reader = read(page)
    assert reader.urls == []
    assert not re.search(r"https?://|url\(|@import", page)
    assert reader.scripts == 1  # its own; the one in the data is text


def test_user_texts_are_text() -> None:
    texts = read(render_page(filled())).texts
    assert sum(text.count(EVIL) for text in texts) >= 6
    assert "<script>alert" not in render_page(filled())


def test_numbers_of_the_page_are_those_of_the_report() -> None:
    text = " ".join(read(render_page(filled())).texts)
    for number in ("1,000", "870", "150", "71.2%", "65.0%", "-130", "×0.50", "31", "12,345"):
        assert number in text
    assert "比较 3 条，低于 0.8 的 3 条" in text


def test_both_languages_are_there() -> None:
    text = " ".join(read(render_page(filled())).texts)
    assert "完全重复" in text
    assert "duplicate" in text
    assert "个人信息" in text
    assert "Personal data" in text


def test_nothing_at_all_still_gives_a_page() -> None:
    read(render_page(DataReport()))
    assert summary_lines(DataReport()) == ["0 rows: 0 kept, 0 left out"]


def test_a_hostile_text_does_not_make_it_huge() -> None:
    report = filled()
    report.examples = [[Piece("x" * 10_000_000, True)]] * 3
    report.rejects = {f"rule{i}": Rule(9, [Sample("w" * 10**6, "r" * 10**6, "t" * 10**6)] * 5) for i in range(30)}
    assert len(render_page(report)) < 1_000_000


def test_the_summary_for_a_terminal() -> None:
    lines = summary_lines(filled())
    assert lines[0] == "1,000 rows and 20 made from them: 870 kept, 150 left out, 12 changed"
    assert lines[1] == "Chinese 71.2% of the letters (before: 65.0%), at least 70% wanted"
    assert "left out 130: duplicate" in lines


# ---- examples as the model reads them


def test_what_is_learnt_is_marked(smollm2: Tokenizer) -> None:
    example = Example((Message("user", "冰箱🧊保修多久？"), Message("assistant", "整机三年。龘")))
    encoded = smollm2.encode_example(example)
    pieces = render_example(encoded, smollm2)
    assert "".join(p.text for p in pieces if p.learnt and not p.special) == "整机三年。龘"
    assert "".join(p.text for p in pieces if not p.special) == smollm2.decode(encoded.ids)
    assert pieces[-1] == Piece("⏹", True, True)  # that it ends is learnt, too


@pytest.mark.parametrize("text", ["🧊", "龘龘龘", "a\nb", "é", "𠮷"])
def test_characters_of_several_tokens_stay_whole(smollm2: Tokenizer, text: str) -> None:
    ids = tuple(smollm2.encode(text))
    (piece,) = render_example(Encoded(ids, (True,) * len(ids)), smollm2)
    assert piece.text == text
