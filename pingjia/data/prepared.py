"""Setting rows aside: one file that can be trained on whole, one with everything else and why."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pingjia.chat.tokenizer import Tokenizer
from pingjia.data.encode import encode_example
from pingjia.data.files import resolve
from pingjia.data.layouts import parse_row
from pingjia.data.problems import Problem
from pingjia.data.rows import Row, read_rows
from pingjia.data.settings import DataSettings
from pingjia.errors import DataError, StorageError


@dataclass(slots=True)
class Prepared:
    """What became of the rows. `reasons` counts rejected rows by their first reason, its numbers written N."""

    num_kept: int = 0
    num_rejected: int = 0
    num_other_domains: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Judged:
    """One row: kept as it is (no reasons), or rejected. `row` is its object, or its text when it is none."""

    where: str
    row: dict[str, Any] | str
    reasons: list[str]
    is_other_domain: bool = False


def prepare(settings: DataSettings, tokenizer: Tokenizer, out: Path) -> Prepared:
    """Write `out`/train.jsonl and `out`/rejected.jsonl from the dataset of a recipe; the dataset stays as it is.

    train.jsonl holds, unchanged, the rows that training with `settings` would take; rejected.jsonl one object per other
    row: where, reasons and the row (or its text). Rows of other domains go to neither. `max_samples` is not applied: it
    chooses among good rows.
    Raises DataError when a file cannot be read or `out` holds either file already, StorageError when the disk refuses.
    """
    names = ("train.jsonl", "rejected.jsonl")
    for name in names:
        if (out / name).exists():
            raise DataError(f"{out / name} exists already; choose another directory, or remove it first")
    parts = [out / f"{name}.part" for name in names]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(parts[0], "wb") as kept, open(parts[1], "wb") as rejected:
            result = _sort(_judge(settings, tokenizer), kept, rejected)
        for part, name in zip(parts, names, strict=True):
            os.replace(part, out / name)
    except OSError as e:
        raise StorageError(f"{out}: the rows could not be written: {e.strerror or e}") from None
    finally:
        for part in parts:
            if part.exists():
                part.unlink()
    return result


def _judge(settings: DataSettings, tokenizer: Tokenizer) -> Iterator[_Judged]:
    for name in settings.dataset:
        for row in read_rows(resolve(name)):
            where = f"{name}:{row.line}"
            if isinstance(row, Row):
                yield _judge_row(row.value, where, settings, tokenizer)
            elif row.lost and row.line == 0:
                raise DataError(f"{name}: {row.field}: {row.reason}")
            elif row.lost:
                yield _Judged(where, row.text, [f"{row.field}: {row.reason}"])


def _judge_row(row: dict[str, Any], where: str, settings: DataSettings, tokenizer: Tokenizer) -> _Judged:
    parsed = parse_row(row, where)
    if parsed.example is None:
        return _Judged(where, row, [f"{name}: {reason}" for name, reason in parsed.faults])
    if settings.domains is not None and parsed.example.domain not in settings.domains:
        return _Judged(where, row, [], is_other_domain=True)
    encoded = encode_example(parsed.example, tokenizer, settings.cutoff_len)
    reasons = [f"{encoded.field}: {encoded.reason}"] if isinstance(encoded, Problem) else []
    return _Judged(where, row, reasons)


def _sort(rows: Iterator[_Judged], kept: BinaryIO, rejected: BinaryIO) -> Prepared:
    result, reasons = Prepared(), Counter[str]()
    for row in rows:
        if row.is_other_domain:
            result.num_other_domains += 1
        elif not row.reasons:
            result.num_kept += 1
            kept.write(_line(row.row))
        else:
            result.num_rejected += 1
            reasons[re.sub(r"\d[\d,]*", "N", row.reasons[0])] += 1
            rejected.write(_line({"where": row.where, "reasons": row.reasons, "row": row.row}))
    result.reasons = dict(reasons.most_common())
    return result


def _line(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair can only be written as an escape
        return json.dumps(value).encode() + b"\n"
