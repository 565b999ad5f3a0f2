"""The columns of all parts as one table: what is decided over all rows at once. Columns lie on disk."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pingjia.data.columns import FileColumn
from pingjia.data.duplicates import NUM_BANDS, NUM_PERM, Signatures
from pingjia.data.parts import Part, Parts
from pingjia.errors import StorageError

_BANDS = tuple(f"band{i}" for i in range(NUM_BANDS))
_SIGNATURES = ("exact", "question", "minhash", *_BANDS)
_STORED = {"chars": "<u4", "tokens": "<u4", "han": "<u4", "letters": "<u4", "lang": "S8", "file": "<u2", "line": "<u4"}


@dataclass(slots=True)
class Table:
    """R records in order. `signatures` are those of the K kept ones, whose rows are `kept_K` (int32).

    `domain_R` (uint16) counts `domains`, of which the first is "-", none. In memory: 6 bytes a record; all else is in
    files, read a chunk at a time.
    """

    columns: Mapping[str, FileColumn]
    domain_R: np.ndarray
    kept_K: np.ndarray
    signatures: Signatures
    domains: list[str]
    files: list[str]

    def __len__(self) -> int:
        return len(self.domain_R)

    def where(self, row: int) -> str:
        """ "file:line" of a record."""
        file, line = (int(self.columns[name][row : row + 1][0]) for name in ("file", "line"))
        return f"{self.files[file]}:{line}"

    def domain_names(self) -> np.ndarray:
        """object [R]: the domain of each record, "-" for none."""
        return np.array(self.domains, dtype=object)[self.domain_R]


def assemble(folders: Sequence[Parts], scratch: Path) -> Table:
    """Join the parts of several folders, in order. The columns go to files in `scratch`, which is overwritten."""
    domains, files = _Names(["-"]), _Names([])
    domain, kept, size = array("H"), array("i"), 0
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            out = {name: stack.enter_context(open(scratch / name, "wb")) for name in (*_STORED, *_SIGNATURES)}
            for parts in folders:
                for number in parts.numbers():
                    part = parts.read(number)
                    columns = _renumbered(part, domains, files)
                    domain.frombytes(columns["domain"].tobytes())
                    kept.frombytes((size + np.flatnonzero(columns["kept"])).astype(np.int32).tobytes())
                    size += len(columns)
                    _append(out, columns, part.signatures)
    except OSError as e:
        raise StorageError(f"{scratch}: cannot be written: {e.strerror or e}") from None
    stored = {name: FileColumn(scratch / name, dtype) for name, dtype in _STORED.items()}
    domain_R, kept_K = np.frombuffer(domain, np.uint16), np.frombuffer(kept, np.int32)
    return Table(stored, domain_R, kept_K, _signatures(scratch), domains.names, files.names)


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


def _append(out: Mapping[str, BinaryIO], columns: np.ndarray, signatures: Signatures) -> None:
    for name, dtype in _STORED.items():
        out[name].write(columns[name].astype(dtype).tobytes())
    out["exact"].write(np.ascontiguousarray(signatures.exact, "<u8").tobytes())
    out["question"].write(np.ascontiguousarray(signatures.question, "<u8").tobytes())
    out["minhash"].write(np.ascontiguousarray(signatures.minhash, "u1").tobytes())
    for name, keys in zip(_BANDS, signatures.bands, strict=True):
        out[name].write(np.ascontiguousarray(keys, "<u8").tobytes())


def _signatures(scratch: Path) -> Signatures:
    return Signatures(
        FileColumn(scratch / "exact", "<u8", 2),
        FileColumn(scratch / "question", "<u8"),
        [FileColumn(scratch / name, "<u8") for name in _BANDS],
        FileColumn(scratch / "minhash", "u1", NUM_PERM),
    )
