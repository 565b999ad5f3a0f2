"""The report as numbers: the same as JSON, and in a few lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pingjia.data.histogram import Histogram
from pingjia.data.rendered import Piece
from pingjia.data.report import (
    DataReport,
    Repeat,
    Rule,
    Sample,
    Scores,
    Share,
    Stage,
    clean,
    load_report,
    percent,
    summary_lines,
)

EVIL = '<script>alert("x")</script>&amp;{}'


def filled() -> DataReport:
    lengths = Histogram.whole(1024)
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
        repeats=[Repeat("leak", f"{EVIL}:1", EVIL, f"{EVIL}:2", EVIL)],
        quality={"reference": scores},
        made={"synonyms": 20},
        refused={"synonyms: no_synonym": 31},
        made_samples=[(EVIL, EVIL)],
        examples=[[Piece("⟨1⟩", False, True), Piece(EVIL + "\n", False), Piece("答", True)]],
        notes=[EVIL],
        seconds=2.5,
        inputs="abc",
    )


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


def test_the_summary_for_a_terminal() -> None:
    assert summary_lines(DataReport()) == ["0 rows: 0 kept, 0 left out"]
    lines = summary_lines(filled())
    assert lines[0] == "1,000 rows and 20 made from them: 870 kept, 150 left out, 12 changed"
    assert lines[1] == "Chinese 71.2% of the letters (before: 65.0%), at least 70% wanted"
    assert "left out 130: duplicate" in lines


def test_what_would_steer_a_terminal_is_shown_as_a_sign() -> None:
    report = DataReport(domains=[Share("\x1b[2Ja\u202eb\ud83d\n", 1, 1)], rejects={"x\x07": Rule(1)})
    text = "\n".join(summary_lines(report))
    assert "␛[2Ja\ufffdb\ufffd" in text
    assert not any(ord(c) < 32 for c in text.replace("\n", ""))
    assert clean("一\ttwo\n") == "一\ttwo\n"


def test_many_domains_are_counted_and_not_listed() -> None:
    report = DataReport(domains=[Share(f"d{i}", 2, 1) for i in range(50)])
    (line,) = [line for line in summary_lines(report) if line.startswith("domains")]
    assert line.endswith("d7 2 -> 1 and 42 more")


@pytest.mark.parametrize(
    ("share", "limit", "text"),
    [
        (None, None, "–"),
        (0.0, None, "0.0%"),
        (0.0001, None, "<0.1%"),
        (0.99999, None, ">99.9%"),
        (1.0, None, "100.0%"),
        (0.7, 0.7, "70.0%"),
        (0.69996, 0.7, "69.996%"),
        (0.70004, 0.7, "70.0%"),
    ],
)
def test_a_share_never_looks_like_what_it_is_not(share: float | None, limit: float | None, text: str) -> None:
    assert percent(share, limit) == text
