"""Put a finished file on disk whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pingjia.errors import StorageError


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write `content` beside `path`, then rename; a crash or a full disk leaves what was there before.

    Half characters (lone surrogates, which answers may hold) are written as \\udXXX: JSON reads them back.
    Raises StorageError when the disk refuses.
    """
    path = Path(path)
    data = content if isinstance(content, bytes) else content.encode("utf-8", errors="backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            _fill(handle, data)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as e:
        raise StorageError(f"{path}: not written ({e.strerror or e}); free some space or choose another folder") from e
    return path


def _fill(handle: int, data: bytes) -> None:
    with open(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.chmod(file.fileno(), 0o666 & ~_umask())  # mkstemp makes files that only the owner can read


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
