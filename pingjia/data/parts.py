"""Records on disk, in numbered parts: work that is done stays done, and no list of rows is ever in memory.

A part is two files: `part-N.jsonl`, a line per record, and `part-N.npz`, what is computed with, in columns. The second
is written last: a part that has it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pingjia.data.duplicates import Signatures
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
        ("file", "<u2"),  # index into the part's list of files
        ("line", "<u4"),
    ]
)


@dataclass(slots=True)
class Part:
    """R records as bytes and columns. `signatures`: of the kept ones, in order."""

    lines: bytes
    columns_R: np.ndarray
    signatures: Signatures
    domains: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, records: Sequence[Record]) -> Part:
        domains = sorted({r.domain for r in records if r.domain is not None})
        files = sorted({_place(r.where)[0] for r in records})
        names = {name: number for number, name in enumerate(domains, start=1)}
        columns = np.array([_values(r, names, files) for r in records], COLUMNS)
        signatures = Signatures.of([r.signature for r in records if r.signature is not None])
        return cls(b"".join(_line(record) for record in records), columns, signatures, domains, files)

    @property
    def num_rows(self) -> int:
        return len(self.columns_R)


def _values(record: Record, domains: Mapping[str, int], files: Sequence[str]) -> tuple[Any, ...]:
    file, line = _place(record.where)
    return (
        record.signature is not None,
        record.num_tokens,
        record.num_chars,
        record.num_han,
        record.num_letters,
        record.lang.encode(),
        domains.get(record.domain or "", 0),
        record.example is not None and record.example.reference is not None,
        files.index(file),
        line,
    )


def _place(where: str) -> tuple[str, int]:
    """(file, line) of "file:12" or "file:12~part2"."""
    file, _, rest = where.rpartition(":")
    digits = rest.partition("~")[0]
    return (file, int(digits)) if digits.isdecimal() else (where, 0)


@dataclass(frozen=True, slots=True)
class Line:
    """A record as it is read back. `row`: to be trained on; `original`: the row in the file, where that differs."""

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
        temporary = self._columns(number).with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self._lines(number), part.lines)
            with open(temporary, "wb") as file:
                np.savez(file, allow_pickle=False, **_arrays(part))
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

    def read(self, number: int) -> Part:
        """A part without its lines."""
        with np.load(self._columns(number), allow_pickle=False) as file:
            signatures = Signatures(file["exact"], file["question"], file["bands"], file["minhash"])
            names = ([str(name) for name in file[key]] for key in ("domains", "files"))
            return Part(b"", file["columns"], signatures, *names)

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


def _arrays(part: Part) -> dict[str, np.ndarray]:
    made = part.signatures
    return {
        "columns": part.columns_R,
        "exact": np.asarray(made.exact),
        "question": np.asarray(made.question),
        "bands": np.asarray(made.bands),
        "minhash": np.asarray(made.minhash),
        "domains": np.array(part.domains, dtype=str),
        "files": np.array(part.files, dtype=str),
    }


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
    if record.original is not None and record.original is not record.row:
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
