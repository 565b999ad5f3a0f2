"""A data file -> raw rows with their lines, in constant memory: JSON Lines, a JSON array, CSV, Parquet; also in gzip.

What a file is, its contents tell, and its name where they leave it open. A row that cannot be read is reported by line
and passed over. Not here: what the fields of a row mean (`layouts.py`).
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pingjia.data.csv_rows import is_csv, read_csv
from pingjia.data.encoding import BOM_UTF8, starts_as_utf16
from pingjia.data.json_rows import read_array, read_lines
from pingjia.data.packed import GZIP, Unpacked
from pingjia.data.raw import MAX_ROW_BYTES, Fault, Row

__all__ = ["MAX_ROW_BYTES", "Fault", "Row", "read_rows"]

_BUFFER_BYTES = 1 << 17
_PARQUET = b"PAR1"
_TABLE_ENDINGS = (".csv", ".tsv", ".tab")
_OTHERS = {  # first bytes -> what is wrong and what to do
    b"PK\x03\x04": "is a zip archive or an Excel workbook; unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "is an old Excel workbook; save the sheet as CSV",
    b"BZh": "is packed by bzip2; unpack it, or pack it by gzip",
    b"\xfd7zXZ": "is packed by xz; unpack it, or pack it by gzip",
    b"\x28\xb5\x2f\xfd": "is packed by zstd; unpack it, or pack it by gzip",
    b"ARROW1": "is an Arrow file; save it as Parquet",
    b"PARE": "is an encrypted Parquet file; save it unencrypted",
    GZIP: "is packed by gzip twice; unpack it once",
    _PARQUET: "is Parquet packed by gzip; unpack it, Parquet is packed in itself",
    b"\0\0\0\0": "begins with NUL bytes, so it is no text or was damaged; get it again",
}


def read_rows(path: Path) -> Iterator[Row | Fault]:
    """Rows and faults in file order. Never raises for what is in a file, or for a file that is not there.

    A file that is another one at the end than it was at the beginning is a fault (line 0).
    """
    try:
        if obstacle := _obstacle(path):
            yield Fault(0, "file", obstacle)
            return
        with open(path, "rb", _BUFFER_BYTES) as file:
            before = os.fstat(file.fileno())
            yield from _read(file, path)
        if change := _change(before, path):
            yield Fault(0, "file", f"{change} while it was read; read it again when nothing writes to it")
    except OSError as e:
        yield Fault(0, "file", f"cannot be read: {e.strerror or e}")


def _obstacle(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "no such file"
    except ValueError:
        return "no such file: a name cannot hold a NUL character"
    if stat.S_ISDIR(mode):
        return "is a directory; give the files in it"
    return "" if stat.S_ISREG(mode) else "is a pipe or a device; save what comes out of it as a file"


def _change(before: os.stat_result, path: Path) -> str:
    try:
        after = path.stat()
    except OSError:
        return "was removed"
    if (after.st_dev, after.st_ino) != (before.st_dev, before.st_ino):
        return "was replaced by another"
    if after.st_size != before.st_size:
        return f"changed (from {before.st_size:,} to {after.st_size:,} bytes)"
    return "changed" if after.st_mtime_ns != before.st_mtime_ns else ""


# ---- what is it?


def _read(file: BinaryIO, path: Path) -> Iterator[Row | Fault]:
    head = _head(file)
    if head.startswith(_PARQUET):
        yield from _read_parquet(path)
    elif head.startswith(GZIP):
        unpacked = Unpacked(file)
        yield from _read_text(io.BufferedReader(unpacked, _BUFFER_BYTES), path.name.removesuffix(".gz"))
        if unpacked.damage:
            yield Fault(0, "file", unpacked.damage)
    else:
        yield from _read_text(file, path.name)


def _read_parquet(path: Path) -> Iterator[Row | Fault]:
    from pingjia.data.parquet_rows import read_parquet  # brings pyarrow, which few files need

    return read_parquet(path)


def _read_text(file: BinaryIO, name: str) -> Iterator[Row | Fault]:
    head = _head(file)
    if fault := _refuse(head):
        yield fault
        return
    start = len(BOM_UTF8) if head.startswith(BOM_UTF8) else 0
    if start:
        yield Fault(1, "encoding", "begins with a byte order mark (BOM); passed over", lost=False)
    file.seek(start)
    ahead = _first_words(file)
    file.seek(start)
    yield from _read_kind(file, name.lower(), ahead)


def _refuse(head: bytes) -> Fault | None:
    """Why the text of a file cannot be read, by its first bytes."""
    for magic, reason in _OTHERS.items():
        if head.startswith(magic):
            return Fault(0, "file", reason)
    if starts_as_utf16(head):
        return Fault(0, "encoding", "UTF-16 or UTF-32 text; save the file as UTF-8")
    return None


def _read_kind(file: BinaryIO, name: str, ahead: bytes) -> Iterator[Row | Fault]:
    if not ahead:
        yield Fault(0, "file", "is empty; there is no row in it")
    elif ahead.startswith(b"["):
        yield from read_array(file)
    elif not ahead.startswith(b"{") and (name.endswith(_TABLE_ENDINGS) or is_csv(ahead)):
        yield from read_csv(file)
    elif name.endswith(".parquet") and not ahead.startswith(b"{"):
        yield Fault(0, "file", "is named .parquet and does not begin as Parquet does; get it again")
    else:
        yield from read_lines(file)


def _head(file: BinaryIO) -> bytes:
    head = file.read(8)
    file.seek(0)
    return head


def _first_words(file: BinaryIO) -> bytes:
    """Some of the file from its first character that is no blank on; nothing if there is none."""
    while chunk := file.read(_BUFFER_BYTES):
        if stripped := chunk.lstrip():
            return stripped
    return b""
