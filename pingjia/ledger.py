"""Append one fact as a JSON line; read them back. Work appends, reports only read.

Schema of a line (docs/formats.md): `v` 1, `at` UTC time, `kind`, `run`, then only those of the measured fields that
are not zero, then `note`. The file is append-only: one `write` per fact, so lines of several processes do not mix.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that happened and what it took. Units are in the names.

    kind: dotted, e.g. "data.check", "train", "eval", "serve.request", "serve". `who` is the key or user to bill.
    """

    kind: str
    run: str = ""
    at: str = ""
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    trained_tokens: int = 0
    learnt_tokens: int = 0
    num_requests: int = 0
    peak_bytes: int = 0
    stored_bytes: int = 0
    energy_wh: float = 0.0
    who: str = ""
    note: dict[str, Any] = field(default_factory=dict)


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Fact) if f.name not in ("kind", "note")}


class Ledger:
    """One ledger file. Safe to append to from several processes at once."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, fact: Fact) -> Fact:
        """Write the fact and return it with its time filled in. Raises OSError when the disk refuses."""
        if not fact.at:
            fact = dataclasses.replace(fact, at=datetime.now(UTC).isoformat(timespec="milliseconds"))
        row: dict[str, Any] = {"v": SCHEMA_VERSION, "at": fact.at, "kind": fact.kind}
        for name, default in _DEFAULTS.items():
            value = getattr(fact, name)
            if name != "at" and value != default:
                row[name] = value
        if fact.note:
            row["note"] = fact.note
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b", buffering=0) as file:
            data = (b"" if _ends_whole(file) else b"\n") + line.encode()
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        return fact

    def read(self, *, kind: str | None = None, run: str | None = None) -> Iterator[Fact]:
        """Yield facts in file order; `kind` also takes its dotted children ("serve" yields "serve.request").

        A line that is not a whole fact (a crash in mid-write) is passed over: later lines are still good.
        """
        if not self.path.exists():
            return
        names = {f.name for f in dataclasses.fields(Fact)}
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    fact = Fact(**{k: v for k, v in row.items() if k in names})
                except (ValueError, TypeError, AttributeError):
                    continue
                if kind is not None and fact.kind != kind and not fact.kind.startswith(kind + "."):
                    continue
                if run is not None and fact.run != run:
                    continue
                yield fact


def _ends_whole(file: io.FileIO) -> bool:
    """Whether the last line is finished. After a crash in mid-write it is not, and would swallow the next fact."""
    size = file.seek(0, os.SEEK_END)
    return size == 0 or os.pread(file.fileno(), 1, size - 1) == b"\n"
