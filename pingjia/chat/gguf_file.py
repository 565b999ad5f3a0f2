"""The metadata at the head of a GGUF file, and nothing behind it.

The `gguf` library maps and parses the whole file, which takes 1.5 s for the packaged model; a tokenizer needs the
first few megabytes, read here in 0.1 s. Tensors are not here: `models/` loads them. Format: GGUF versions 2 and 3,
little-endian, as described by the ggml project.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from pingjia.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ITEMS = 50_000_000  # a broken length must not become an allocation


def read_metadata(path: Path) -> dict[str, Any]:
    """All key-value pairs of a GGUF file. Raises ModelError for anything that is not one."""
    try:
        with open(path, "rb") as file:
            return _read(file)
    except (struct.error, UnicodeDecodeError, KeyError, ValueError, MemoryError) as e:
        raise ModelError(f"{path}: not a readable GGUF file ({e}); fetch it again") from None
    except OSError as e:
        raise ModelError(f"{path}: cannot be read: {e}") from None


def _read(file: BinaryIO) -> dict[str, Any]:
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = _scalar(file, "I")
    if version not in (2, 3):
        raise ValueError(f"format version {version}; 2 and 3 are read")
    _scalar(file, "Q")  # number of tensors
    pairs = {}
    for _ in range(_count(file)):
        key = _string(file)
        pairs[key] = _value(file, _scalar(file, "I"))
    return pairs


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _scalar(file, _SCALARS[kind])
    kind, count = _scalar(file, "I"), _count(file)
    if kind in _SCALARS:
        form = f"<{count}{_SCALARS[kind]}"
        return list(struct.unpack(form, file.read(struct.calcsize(form))))
    return [_value(file, kind) for _ in range(count)]


def _count(file: BinaryIO) -> int:
    count: int = _scalar(file, "Q")
    if count > _MAX_ITEMS:
        raise ValueError(f"a length of {count}")
    return count


def _string(file: BinaryIO) -> str:
    size = _count(file)
    data = file.read(size)
    if len(data) < size:
        raise ValueError("it ends in the middle of a string")
    return data.decode("utf-8")


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))[0]
