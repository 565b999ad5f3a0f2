"""Preparing sets every bad row aside with its reasons and keeps the rest as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pingjia.chat.tokenizer import Tokenizer
from pingjia.data import check_files, prepare
from pingjia.data.settings import DataSettings
from pingjia.errors import DataError, StorageError

Write = Callable[..., Path]

GOOD = {"prompt": "你好", "response": "您好", "domain": "a", "id": 7}
LONG = {"prompt": "长" * 300, "response": "x", "domain": "a"}


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _settings(*files: Path, **more: Any) -> DataSettings:
    return DataSettings.model_validate({"dataset": [str(f) for f in files], "cutoff_len": 100, **more})


def test_every_row_goes_somewhere(write: Write, tmp_path: Path, smollm2: Tokenizer) -> None:
    half = '{"prompt": "\\ud800", "response": "x"}'
    text = "\n".join(
        [json.dumps(GOOD, ensure_ascii=False), "{broken", json.dumps(LONG), '{"prompt": "q"}', half, "[1]"]
    )
    path = write(text)
    before = path.read_bytes()
    result = prepare(_settings(path), smollm2, tmp_path / "out")
    assert (result.num_kept, result.num_rejected) == (1, 5)
    assert _rows(tmp_path / "out" / "train.jsonl") == [GOOD]
    rejected = _rows(tmp_path / "out" / "rejected.jsonl")
    assert [r["where"] for r in rejected] == [f"{path}:{n}" for n in range(2, 7)]
    assert [r["reasons"][0].split(":")[0] for r in rejected] == ["json", "length", "response", "prompt", "json"]
    assert rejected[0]["row"] == "{broken"
    assert rejected[1]["row"] == LONG
    assert rejected[3]["row"] == {"prompt": "\ud800", "response": "x"}
    assert path.read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["rejected.jsonl", "train.jsonl"]


def test_what_is_kept_is_clean(write: Write, tmp_path: Path, smollm2: Tokenizer) -> None:
    path = write([GOOD, LONG, {"prompt": ""}, {"instruction": "i", "output": "o"}])
    prepare(_settings(path), smollm2, tmp_path / "out")
    report = check_files([tmp_path / "out" / "train.jsonl"], smollm2, 100)
    assert report.ok
    assert report.num_examples == 2


def test_reasons_are_counted_without_their_numbers(write: Write, tmp_path: Path, smollm2: Tokenizer) -> None:
    path = write([LONG, {**LONG, "prompt": "长" * 400}, {"prompt": "q"}])
    result = prepare(_settings(path), smollm2, tmp_path / "out")
    assert list(result.reasons.values()) == [2, 1]
    assert next(iter(result.reasons)).startswith("length: N tokens, over cutoff_len N")


def test_rows_of_other_domains_are_not_rejected(write: Write, tmp_path: Path, smollm2: Tokenizer) -> None:
    path = write([GOOD, {**GOOD, "domain": "b"}, {**GOOD, "domain": None}])
    result = prepare(_settings(path, domains=["a"]), smollm2, tmp_path / "out")
    assert (result.num_kept, result.num_rejected, result.num_other_domains) == (1, 0, 2)


def test_gbk_rows_are_written_as_utf8(write: Write, tmp_path: Path, smollm2: Tokenizer) -> None:
    row = {"prompt": "你好吗，朋友", "response": "我很好，谢谢"}
    path = write(json.dumps(row, ensure_ascii=False).encode("gbk"))
    prepare(_settings(path), smollm2, tmp_path / "out")
    assert _rows(tmp_path / "out" / "train.jsonl") == [row]


def test_nothing_is_overwritten(write: Write, tmp_path: Path, smollm2: Tokenizer) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rejected.jsonl").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        prepare(_settings(write([GOOD])), smollm2, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["rejected.jsonl"]
    assert (tmp_path / "out" / "rejected.jsonl").read_text() == "mine"


def test_a_missing_file_leaves_nothing_behind(write: Write, tmp_path: Path, smollm2: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl: file: no such file"):
        prepare(_settings(write([GOOD]), tmp_path / "no.jsonl"), smollm2, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_refuses(write: Write, tmp_path: Path, smollm2: Tokenizer) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(StorageError, match="could not be written"):
        prepare(_settings(write([GOOD])), smollm2, tmp_path / "taken" / "out")


def test_public_file_with_lists_for_answers(shared: Path, tmp_path: Path, smollm2: Tokenizer) -> None:
    result = prepare(_settings(shared / "d2q_1.jsonl"), smollm2, tmp_path / "out")
    assert (result.num_kept, result.num_rejected) == (0, 20)
    assert isinstance(_rows(tmp_path / "out" / "rejected.jsonl")[0]["row"]["output"], list)
