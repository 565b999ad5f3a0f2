"""What the report of a real run says: of rows that are shown, of pairs that repeat each other, of shares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pingjia.data.prepared import Job, prepare
from pingjia.data.report import DataReport, Repeat, Share, load_report
from pingjia.data.settings import DataSettings, PrepareSettings

Run = Callable[..., DataReport]
ROW = {"prompt": "你们几点开门？", "response": "每天上午九点开门，欢迎光临。"}


@pytest.fixture
def run(tmp_path: Path, write: Callable[..., Path], smollm2: object) -> Run:
    """run(rows, held_out=rows, **settings of prepare) -> the report, as it was written."""

    def run(rows: list[Any], held_out: list[Any] | None = None, **settings: Any) -> DataReport:
        files = [str(write(held_out, "heldout.jsonl"))] if held_out else []
        data = DataSettings(dataset=[str(write(rows, "a.jsonl"))], eval_dataset=files)
        prepare(Job(data, PrepareSettings(**settings), "smollm2", tmp_path / "out"))
        report = load_report(tmp_path / "out" / "report.json")
        assert report is not None
        return report

    return run


def test_a_number_that_is_personal_does_not_stop_the_run(run: Run) -> None:
    report = run([{**ROW, "id": 13812345678, "prompt": "我的电话是13812345678，几点开门？"}])
    shown = json.dumps(report.to_dict(), ensure_ascii=False)
    assert report.num_kept == 1
    assert len(report.examples) == 1
    assert "13812345678" not in shown
    assert "".join(p.text for p in report.examples[0]).count("【手机号】") == 1


def test_pairs_that_repeat_each_other_are_shown_masked(run: Run, tmp_path: Path) -> None:
    near = {
        "prompt": "请问你们店每天早上几点钟开门营业？我的电话是13812345678",
        "response": "每天上午九点开门，欢迎光临。",
    }
    nearly = {**near, "prompt": near["prompt"].replace("请问", "请问下")}
    leak = {"prompt": "签收以后还能退货吗？", "response": "七天之内都可以退货。"}
    report = run([ROW, ROW, near, nearly, leak], [leak])
    found = {pair.rule: pair for pair in report.repeats}
    places = {rule: (Path(p.where).name, Path(p.other_where).name) for rule, p in found.items()}
    assert places == {
        "duplicate": ("a.jsonl:2", "a.jsonl:1"),
        "near_duplicate": ("a.jsonl:4", "a.jsonl:3"),
        "leak": ("a.jsonl:5", "heldout.jsonl:1"),
    }
    assert found["leak"].text == found["leak"].other_text == "签收以后还能退货吗？ ⏎ 七天之内都可以退货。"
    assert "【手机号】" in found["near_duplicate"].text
    assert "13812345678" not in json.dumps(report.to_dict())


def test_few_pairs_of_each_rule_are_shown(run: Run) -> None:
    report = run([ROW] * 40)
    assert report.rejects["duplicate"].count == 39
    assert len(report.repeats) == 5
    assert all(isinstance(pair, Repeat) for pair in report.repeats)


def test_shares_are_told_in_rows_and_characters_beside_what_was_wanted(run: Run) -> None:
    rows = [{**ROW, "domain": "a", "prompt": f"第{i}号店几点开门？"} for i in range(3)]
    rows.append({"prompt": "When do you open?", "response": "At nine every morning.", "domain": "b"})
    report = run(rows, domains={"target": "balanced"}, duplicates={"near": None})
    a, b = report.domains
    assert (a.name, a.num_before, a.num_after, a.wanted) == ("a", 3, 1, 0.5)
    assert b == Share("b", 1, 1, 1.0, b.chars_before, b.chars_after, 0.5)
    assert b.chars_before == b.chars_after == len("When do you open?\nAt nine every morning.")
    assert a.chars_before == 3 * a.chars_after
    assert {s.name: s.num_before for s in report.languages} == {"zh": 3, "en": 1}
