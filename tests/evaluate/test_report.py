"""Reports on disk: read back equal, whole or not at all, and refused in words."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from pingjia.errors import DataError, StorageError
from pingjia.evaluate import EvalReport, EvalSettings, evaluate
from pingjia.evaluate.store import write_whole


@pytest.fixture
def report(ask, scripted) -> EvalReport:
    questions = [ask("保修多久？", "36个月", where="a:1", domain="售后", facts=("36个月",)), ask("q", "a", where="a:2")]
    return evaluate(questions, scripted(["36个月\ud800", "b"]), EvalSettings())


def test_saved_and_loaded_reports_are_equal(report: EvalReport, tmp_path: Path) -> None:
    path = report.save(tmp_path / "new" / "before.json")
    assert EvalReport.load(path) == report
    assert json.loads(path.read_text())["overall"]["scores"]["exact_facts"]["mean"] == 1.0
    assert os.listdir(path.parent) == ["before.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_the_encoder_is_kept_and_reports_from_before_there_was_one_are_read(report: EvalReport, tmp_path: Path) -> None:
    path = replace(report, encoder="minilm, layer 3").save(tmp_path / "r.json")
    assert EvalReport.load(path).encoder == "minilm, layer 3"
    raw = report.to_dict()
    del raw["encoder"]
    path.write_text(json.dumps(raw))
    assert EvalReport.load(path) == report


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_full_disk_leaves_the_old_report(report: EvalReport, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        report.save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not written"):
        write_whole(tmp_path / "file" / "r.json", "x")


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(v=2),
        lambda raw: raw.pop("v"),
        lambda raw: raw.update(metrics=["rouge_9"]),
        lambda raw: raw.update(rows=[]),
        lambda raw: raw["rows"][0].pop("answer"),
        lambda raw: raw["rows"][0].update(extra=1),
        lambda raw: raw["rows"][0].update(scores=[1]),
        lambda raw: raw["rows"][0].update(prompt=[{"role": "user"}]),
        lambda raw: raw.update(max_tokens="many"),
    ],
)
def test_a_damaged_report_is_refused_by_name(report: EvalReport, tmp_path: Path, change) -> None:
    raw = report.to_dict()
    change(raw)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError):
        EvalReport.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe"])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"r\.json"):
        EvalReport.load(path)


def test_a_missing_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        EvalReport.load(tmp_path / "none.json")


def test_a_lone_language_is_not_repeated(report: EvalReport, ask, scripted) -> None:
    assert [name for name, _ in report.groups()] == [
        "overall", "domain (no domain)", "domain 售后", "language en", "language zh"
    ]  # fmt: skip
    one = evaluate([ask("你好", "你好")], scripted(["你好"]), EvalSettings())
    assert [name for name, _ in one.groups()] == ["overall"]
