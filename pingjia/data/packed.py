"""Gzip files as the bytes that are in them, in constant memory; damage ends the reading and is told afterwards."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import BinaryIO

GZIP = b"\x1f\x8b"


class Unpacked(io.RawIOBase):
    """The contents of a gzip file, also of several written one after the other.

    Where the packed data are damaged or cut off it ends, as a file would; `damage` then says so. Seeking backwards
    begins anew, so it is for looking ahead once or twice only.
    """

    def __init__(self, packed: BinaryIO) -> None:
        self.damage = ""
        self._gzip = gzip.GzipFile(fileobj=packed, mode="rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._gzip.seek(offset, whence)

    def tell(self) -> int:
        return self._gzip.tell()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._gzip.read1(len(buffer))
        except (EOFError, OSError, zlib.error) as e:
            self.damage = self._say(e)
            return 0
        buffer[: len(data)] = data
        return len(data)

    def _say(self, error: Exception) -> str:
        kind = "end before they are whole" if isinstance(error, EOFError) else f"are damaged ({error})"
        return f"the gzip data {kind}, after {self.tell():,} bytes of text; what follows is lost, get the file again"
