"""The columns of all parts as one table: what is decided over all rows at once. Large columns lie on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pingjia.data.duplicates import NUM_BANDS, NUM_PERM, Signatures
from pingjia.data.parts import COLUMNS, Part, Parts
from pingjia.errors import StorageError

_FILES = ("exact", "question", "minhash", *(f"band{i}" for i in range(NUM_BANDS)))


@dataclass(slots=True)
class Table:
    """R records in order. `signatures` are those of the K kept ones, whose rows are `kept_K`.

    `domains[0]` is "-", none. In memory: about 40 bytes a record; the signatures are files that are mapped.
    """

    columns_R: np.ndarray
    kept_K: np.ndarray
    signatures: Signatures
    domains: list[str]
    files: list[str]

    def __len__(self) -> int:
        return len(self.columns_R)

    def where(self, row: int) -> str:
        """ "file:line" of a record."""
        return f"{self.files[self.columns_R['file'][row]]}:{self.columns_R['line'][row]}"

    def domain_names(self) -> np.ndarray:
        """object [R]: the domain of each record, "-" for none."""
        return np.array(self.domains, dtype=object)[self.columns_R["domain"]]


def assemble(folders: Sequence[Parts], scratch: Path) -> Table:
    """Join the parts of several folders, in order. The signatures go to files in `scratch`, which is overwritten."""
    domains, files = _Names(["-"]), _Names([])
    columns: list[np.ndarray] = []
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        out = {name: open(scratch / name, "wb") for name in _FILES}  # noqa: SIM115  closed below
        try:
            for parts in folders:
                for number in parts.numbers():
                    part = parts.read(number)
                    columns.append(_renumbered(part, domains, files))
                    _append(out, part.signatures)
        finally:
            for file in out.values():
                file.close()
    except OSError as e:
        raise StorageError(f"{scratch}: cannot be written: {e.strerror or e}") from None
    table = np.concatenate(columns) if columns else np.zeros(0, COLUMNS)
    return Table(table, np.flatnonzero(table["kept"]), _mapped(scratch), domains.names, files.names)


class _Names:
    """Names and their numbers, in the order in which they came."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def numbers(self, names: Sequence[str]) -> list[int]:
        for name in names:
            if name not in self.names:
                self.names.append(name)
        return [self.names.index(name) for name in names]


def _renumbered(part: Part, domains: _Names, files: _Names) -> np.ndarray:
    """The columns with numbers of domains and files that hold for the whole table."""
    columns = part.columns_R.copy()
    columns["domain"] = np.array([0, *domains.numbers(part.domains)], np.uint16)[columns["domain"]]
    columns["file"] = np.array([*files.numbers(part.files), 0], np.uint16)[columns["file"]]
    return columns


def _append(out: Mapping[str, BinaryIO], signatures: Signatures) -> None:
    if not len(signatures):
        return
    out["exact"].write(np.ascontiguousarray(signatures.exact, "<u8").data)
    out["question"].write(np.ascontiguousarray(signatures.question, "<u8").data)
    out["minhash"].write(np.ascontiguousarray(signatures.minhash, "u1").data)
    for number in range(NUM_BANDS):
        out[f"band{number}"].write(np.ascontiguousarray(signatures.bands[number], "<u8").data)


class _Bands(Sequence[np.ndarray]):
    """The bands, each read from its file when it is wanted: one at a time in memory."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    def __len__(self) -> int:
        return NUM_BANDS

    def __getitem__(self, number: int) -> np.ndarray:  # type: ignore[override]
        if not 0 <= number < NUM_BANDS:
            raise IndexError(number)
        return np.fromfile(self._scratch / f"band{number}", "<u8")


def _mapped(scratch: Path) -> Signatures:
    exact = np.fromfile(scratch / "exact", "<u8").reshape(-1, 2)
    question = np.fromfile(scratch / "question", "<u8")
    if not len(question):
        return Signatures.of([])
    minhash = np.memmap(scratch / "minhash", "u1", "r", shape=(len(question), NUM_PERM))
    return Signatures(exact, question, _Bands(scratch), minhash)  # type: ignore[arg-type]
