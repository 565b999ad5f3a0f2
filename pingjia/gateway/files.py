"""Files that clients upload for batches and read their results from: on disk, beside each a JSON of what it is.

Everything belongs to an owner (a key or its tenant); another owner's file does not exist. Not here: batches themselves.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pingjia.errors import StorageError
from pingjia.gateway.errors import BodyTooLarge, JobNotFound
from pingjia.gateway.settings import GatewaySettings

_ID = re.compile(r"file-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What is known of a file. purpose: batch or batch_output. num_bytes as uploaded or finished."""

    id: str
    owner: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: int


def state_dir(settings: GatewaySettings) -> Path:
    """Where files and batches lie: for each port a place of its own, so that services do not take over each other's."""
    if settings.files_dir is not None:
        return Path(settings.files_dir).expanduser()
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "pingjia" / str(settings.port)


class FileStore:
    """The files below one directory. Several processes may share it."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root = root / "files"
        self.max_bytes = max_bytes

    async def upload(self, owner: str, filename: str, pieces: AsyncIterator[bytes]) -> FileRecord:
        """Keep what comes. Raises BodyTooLarge, or StorageError when the disk refuses; nothing is left then."""
        file_id = self.new_id()
        path, num_bytes = self.path(file_id), 0
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(path, "xb") as file:
                async for piece in pieces:
                    num_bytes += len(piece)
                    if num_bytes > self.max_bytes:
                        raise BodyTooLarge(f"the file has more than {self.max_bytes} bytes, which this server takes")
                    file.write(piece)
            return self.register(file_id, owner, filename, "batch")
        except OSError as e:
            path.unlink(missing_ok=True)
            raise StorageError(f"the file could not be kept: {e.strerror}; nothing of it is") from None
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def register(self, file_id: str, owner: str, filename: str, purpose: str) -> FileRecord:
        """Make a file that is there known to its owner. Raises OSError."""
        size = self.path(file_id).stat().st_size
        record = FileRecord(file_id, owner, filename[:200], purpose, size, int(time.time()))
        write_whole(self._about(file_id), json.dumps(asdict(record)))
        return record

    def find(self, file_id: str, owner: str) -> FileRecord:
        """The file of that id. Raises JobNotFound, also for another owner's."""
        record = self._read(file_id)
        if record is None or record.owner != owner:
            raise JobNotFound(f"no file {file_id[:80]!r}")
        return record

    def of(self, owner: str) -> list[FileRecord]:
        """An owner's files, the newest first."""
        return sorted((r for r in self._all() if r.owner == owner), key=lambda r: (-r.created_at, r.id))

    def remove(self, file_id: str, owner: str) -> None:
        """Forget it and its content. Raises JobNotFound."""
        self.find(file_id, owner)
        self._about(file_id).unlink(missing_ok=True)
        self.path(file_id).unlink(missing_ok=True)

    def path(self, file_id: str) -> Path:
        """Where its content lies. `file_id` must come from here, not from a client."""
        return self.root / f"{file_id}.jsonl"

    @staticmethod
    def new_id() -> str:
        return f"file-{uuid.uuid4().hex}"

    def _about(self, file_id: str) -> Path:
        return self.root / f"{file_id}.json"

    def _read(self, file_id: str) -> FileRecord | None:
        if not _ID.fullmatch(file_id):
            return None
        try:
            return FileRecord(**json.loads(self._about(file_id).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _all(self) -> Iterator[FileRecord]:
        for path in self.root.glob("file-*.json"):
            record = self._read(path.stem)
            if record is not None:
                yield record


def write_whole(path: Path, text: str) -> None:
    """Replace a small file, so that whoever reads it sees the old or the new one. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
