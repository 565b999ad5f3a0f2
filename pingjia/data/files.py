"""Names of data files: where they lie, and what their contents add up to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pingjia.errors import DataError

SAMPLES = Path(__file__).parent / "samples"
_PREFIX = "samples:"


def resolve(name: str | Path) -> Path:
    """A path as it is; `samples:NAME` as the packaged file NAME. DataError for a sample that is not there."""
    if not str(name).startswith(_PREFIX):
        return Path(name).expanduser()
    path = SAMPLES / str(name).removeprefix(_PREFIX)
    if path.parent != SAMPLES or not path.is_file():
        known = ", ".join(sorted(p.name for p in SAMPLES.glob("*.jsonl")))
        raise DataError(f"{name}: no such sample; packaged are: {known}")
    return path


def fingerprint(files: Iterable[str | Path]) -> str:
    """sha256 hex over the contents of `files` in order; names do not count. DataError when one cannot be read."""
    total = hashlib.sha256()
    for name in files:
        try:
            with open(resolve(name), "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())  # digests, so that borders count
        except OSError as e:
            raise DataError(f"{name}: cannot be read: {e.strerror}") from None
    return total.hexdigest()


def estimate_rows(files: Iterable[str | Path]) -> int | None:
    """About how many rows the files have, from their line ends; None when that says nothing (gzip, Parquet, one array
    over many lines). Reads at the speed of the disk. For a progress bar."""
    total = 0
    for name in files:
        try:
            with open(resolve(name), "rb") as file:
                head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
                if not head.startswith(b"{"):
                    return None
                file.seek(0)
                total += sum(chunk.count(b"\n") for chunk in iter(lambda f=file: f.read(1 << 20), b""))  # type: ignore[misc]
        except OSError:
            return None
    return total
