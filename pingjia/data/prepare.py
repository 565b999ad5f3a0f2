"""Data files -> a directory with what can be trained on and what cannot. Every row lands in exactly one of the two."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pingjia.chat.tokenizer import Tokenizer
from pingjia.data.encode import encode_example
from pingjia.data.files import resolve
from pingjia.data.layouts import parse_row
from pingjia.data.problems import Problem
from pingjia.data.rows import MAX_ROW_BYTES, Fault, Row, read_rows
from pingjia.data.settings import DataSettings
from pingjia.errors import DataError, StorageError

KEPT_FILE = "train.jsonl"
REJECTED_FILE = "rejected.jsonl"


@dataclass(frozen=True, slots=True)
class Prepared:
    """How many rows went where; `reasons` counts rejected rows by field."""

    num_kept: int
    num_rejected: int
    reasons: dict[str, int]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is not trained on. `row` is its value where it could be read, else `text` its line as it stands."""

    file: str
    line: int
    problems: tuple[tuple[str, str], ...]
    row: dict[str, Any] | None = None
    text: str | None = None

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"file": self.file, "line": self.line}
        found["problems"] = [{"field": field, "reason": reason} for field, reason in self.problems]
        return found | ({"row": self.row} if self.row is not None else {"text": self.text})


def prepare(settings: DataSettings, tokenizer: Tokenizer, out: Path) -> Prepared:
    """Write train.jsonl (sound rows as they were) and rejected.jsonl (the others, each with its reasons) into `out`.

    `max_samples` is not applied: it is a choice of one training, not of the data. Raises DataError when `out` exists or
    a file cannot be read at all, StorageError when the disk refuses; `out` is then not created.
    """
    if out.exists():
        raise DataError(f"{out} exists; choose a new directory (--out), nothing is overwritten")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        result = _write(settings, tokenizer, partial)
        os.replace(partial, out)
    except OSError as e:
        raise StorageError(f"{out}: not written ({e.strerror or e}); make room or choose another directory") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def _write(settings: DataSettings, tokenizer: Tokenizer, folder: Path) -> Prepared:
    num_kept, num_rejected, reasons = 0, 0, Counter[str]()
    with (
        open(folder / KEPT_FILE, "w", encoding="utf-8") as kept,
        open(folder / REJECTED_FILE, "w", encoding="utf-8") as rejected,
    ):
        for row in _sorted_out(settings, tokenizer):
            if isinstance(row, Rejected):
                num_rejected += 1
                reasons.update({field for field, _ in row.problems})
                _write_line(rejected, row.to_dict())
            else:
                num_kept += 1
                _write_line(kept, row)
    return Prepared(num_kept, num_rejected, dict(reasons.most_common()))


def _write_line(file: IO[str], value: dict[str, Any]) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: only its escape can be written
        text = json.dumps(value)
    file.write(text + "\n")


def _sorted_out(settings: DataSettings, tokenizer: Tokenizer) -> Iterator[dict[str, Any] | Rejected]:
    for name in settings.dataset:
        path = resolve(name)
        for row in read_rows(path):
            if isinstance(row, Fault):
                if row.lost:
                    yield _unreadable(name, path, row)
            else:
                yield _judge(name, row, settings, tokenizer)


def _unreadable(name: str, path: Path, fault: Fault) -> Rejected:
    if fault.line == 0:
        raise DataError(f"{name}: {fault.field}: {fault.reason}")
    return Rejected(name, fault.line, ((fault.field, fault.reason),), text=_raw_line(path, fault.line))


def _judge(name: str, row: Row, settings: DataSettings, tokenizer: Tokenizer) -> dict[str, Any] | Rejected:
    parsed = parse_row(row.value, f"{name}:{row.line}")
    problems = tuple(parsed.faults)
    if parsed.example is not None and not problems:
        if settings.domains is not None and parsed.example.domain not in settings.domains:
            problems = (("domain", f"{parsed.example.domain!r} is not one of {', '.join(settings.domains)}"),)
        encoded = encode_example(parsed.example, tokenizer, settings.cutoff_len)
        if isinstance(encoded, Problem):
            problems = (*problems, (encoded.field, encoded.reason))
    return Rejected(name, row.line, problems, row=row.value) if problems else row.value


def _raw_line(path: Path, number: int) -> str:
    """Line `number` as it stands, at most MAX_ROW_BYTES of it; bytes that are no UTF-8 as \\xNN."""
    with open(path, "rb") as file:
        current = 1
        while current < number and (piece := file.readline(MAX_ROW_BYTES)):
            current += piece.endswith(b"\n")
        return file.readline(MAX_ROW_BYTES).rstrip(b"\r\n").decode("utf-8", errors="backslashreplace")
