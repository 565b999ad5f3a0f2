"""Records on disk, in numbered parts: work that is done stays done, and no list of rows is ever in memory.

A part is two files: `part-N.jsonl`, a line per record, and `part-N.npz`, what is computed with, in columns. The second
is written last: a part that has it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pingjia.data.problems import Finding
from pingjia.data.record import Record
from pingjia.errors import StorageError

COLUMNS = np.dtype(
    [
        ("kept", "?"),
        ("tokens", "<u4"),
        ("chars", "<u4"),
        ("han", "<u4"),
        ("letters", "<u4"),
        ("lang", "S8"),
        ("domain", "<u2"),  # index into the part's list of domains; 0 is none
        ("reference", "?"),
        ("exact", "V16"),
    ]
)


@dataclass(slots=True)
class Part:
    """Records as bytes and columns. `minhash_KP`: signatures of the K kept ones, in order."""

    lines: bytes
    columns: np.ndarray
    minhash_KP: np.ndarray
    domains: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, records: Sequence[Record]) -> Part:
        domains = sorted({r.domain for r in records if r.domain is not None})
        index = {name: number for number, name in enumerate(domains, start=1)}
        columns = np.zeros(len(records), COLUMNS)
        for row, record in zip(columns, records, strict=True):
            exact = record.signature.exact if record.signature is not None else bytes(16)
            row[...] = (
                record.signature is not None,
                record.num_tokens,
                record.num_chars,
                record.num_han,
                record.num_letters,
                record.lang.encode(),
                index.get(record.domain or "", 0),
                record.example is not None and record.example.reference is not None,
                np.void(exact),
            )
        hashes = [r.signature.minhash for r in records if r.signature is not None]
        return cls(
            lines=b"".join(_line(record) for record in records),
            columns=columns,
            minhash_KP=np.stack(hashes) if hashes else np.zeros((0, 0), np.uint32),
            domains=domains,
        )

    @property
    def num_rows(self) -> int:
        return len(self.columns)


@dataclass(frozen=True, slots=True)
class Line:
    """A record as it is read back. `row`: to be trained on, or as it stands in the file; `original`: if that differs."""

    where: str
    row: dict[str, Any] | str
    faults: tuple[Finding, ...] = ()
    changes: tuple[Finding, ...] = ()
    remarks: tuple[Finding, ...] = ()
    personal: dict[str, int] = field(default_factory=dict)
    layout: str | None = None
    original: dict[str, Any] | None = None


class Parts:
    """The parts in one directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, number: int) -> bool:
        return self._columns(number).is_file()

    def write(self, number: int, part: Part) -> None:
        """Raises StorageError when the disk refuses; parts that are there stay."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self._lines(number), part.lines)
            temporary = self._columns(number).with_suffix(".partial")
            with open(temporary, "wb") as file:
                np.savez(file, columns=part.columns, minhash=part.minhash_KP, domains=np.array(part.domains, dtype=str))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._columns(number))
        except OSError as e:
            raise StorageError(
                f"{self.folder}: part {number} was not written ({e.strerror or e}); make room and run the same command "
                "again, it goes on from here"
            ) from None

    def numbers(self) -> list[int]:
        return sorted(int(f.stem.removeprefix("part-")) for f in self.folder.glob("part-*.npz"))

    def columns(self, number: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """(columns, minhash_KP, names of domains) of a part."""
        with np.load(self._columns(number), allow_pickle=False) as file:
            return file["columns"], file["minhash"], [str(name) for name in file["domains"]]

    def lines(self, number: int) -> Iterator[Line]:
        with open(self._lines(number), "rb") as file:
            for data in file:
                yield _parse(data)

    def all_lines(self) -> Iterator[Line]:
        """Every record, in order."""
        for number in self.numbers():
            yield from self.lines(number)

    def _lines(self, number: int) -> Path:
        return self.folder / f"part-{number:06}.jsonl"

    def _columns(self, number: int) -> Path:
        return self.folder / f"part-{number:06}.npz"


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _line(record: Record) -> bytes:
    value: dict[str, Any] = {"where": record.where, "row": record.row}
    for name in ("faults", "changes", "remarks"):
        findings: Iterable[Finding] = getattr(record, name)
        if findings:
            value[name] = [[f.rule, f.field, f.reason] for f in findings]
    if record.personal:
        value["personal"] = record.personal
    if record.layout:
        value["layout"] = record.layout
    if record.original is not None and record.changes:
        value["original"] = record.original
    return dump(value)


def _parse(data: bytes) -> Line:
    value = json.loads(data)
    for name in ("faults", "changes", "remarks"):
        value[name] = tuple(Finding(*finding) for finding in value.get(name, ()))
    return Line(**value)


def dump(value: Any) -> bytes:
    """One JSON line; half of a surrogate pair, which only an escape can hold, as one."""
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode() + b"\n"
