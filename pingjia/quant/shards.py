"""The directory that compression writes: shards of tensors, their index with checksums, and reading them back.

Every tensor has a sha256 of its name, kind, shape and bytes in `model.safetensors.index.json` (key "sha256"), so a
flipped bit is found and named when the tensor is read. Shards appear one by one under their final names, so what is
there of an interrupted run is whole. Not here: the network they belong to (`models/`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pingjia.errors import ModelError

INDEX = "model.safetensors.index.json"


def tensor_digest(name: str, tensor: torch.Tensor) -> str:
    """sha256 hex over name, dtype, shape and bytes."""
    digest = hashlib.sha256(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(flat)
    return digest.hexdigest()


def require_digest(where: Path, name: str, tensor: torch.Tensor, wanted: str) -> None:
    """Raise ModelError naming the tensor when its bytes are not those that were written."""
    if tensor_digest(name, tensor) != wanted:
        raise ModelError(
            f"{where}: {name} is not as it was written (its checksum differs): the file is damaged; copy it again or "
            "quantise again"
        )


class ShardWriter:
    """Writes `num_shards` shards into a directory that exists. A shard that is there already is kept."""

    def __init__(self, folder: Path, num_shards: int) -> None:
        self.folder, self.num_shards = folder, num_shards

    def file(self, number: int) -> Path:
        """Shard `number` of 1..num_shards."""
        return self.folder / f"model-{number:05d}-of-{self.num_shards:05d}.safetensors"

    def is_done(self, number: int) -> bool:
        return self.file(number).is_file() and self._side(number).is_file()

    def write(self, number: int, tensors: Mapping[str, torch.Tensor], note: Any = None) -> None:
        """All of a shard or none. `note` (JSON) is kept beside it until `clean`. OSError when the disk refuses."""
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        temporary = self.folder / f"shard-{number}.tmp"
        side = {"sha256": {n: tensor_digest(n, t) for n, t in whole.items()}, "note": note}
        try:
            save_file(whole, temporary, metadata={"format": "pt"})
            _sync(temporary)
            self._side(number).write_text(json.dumps(side), encoding="utf-8")
            os.replace(temporary, self.file(number))
        except SafetensorError as e:
            full = "os error 28" in str(e).lower() or "no space" in str(e).lower()
            raise OSError(errno.ENOSPC if full else errno.EIO, str(e), str(temporary)) from None
        finally:
            temporary.unlink(missing_ok=True)

    def note(self, number: int) -> Any:
        """What was noted with a shard that is done."""
        return self._read(number)["note"]

    def finish(self) -> int:
        """Write the index; return the bytes of all shards."""
        sums = {number: self._read(number)["sha256"] for number in range(1, self.num_shards + 1)}
        total = sum(self.file(number).stat().st_size for number in sums)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: self.file(number).name for number in sums for name in sums[number]},
            "sha256": {name: value for own in sums.values() for name, value in own.items()},
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return total

    def clean(self) -> None:
        """Remove what only a restart needs."""
        for number in range(1, self.num_shards + 1):
            self._side(number).unlink(missing_ok=True)

    def _side(self, number: int) -> Path:
        return self.folder / f"shard-{number}.json"

    def _read(self, number: int) -> dict[str, Any]:
        return dict(json.loads(self._side(number).read_text(encoding="utf-8")))


def read_shard(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of one shard."""
    return load_file(file)


def read_digests(directory: Path) -> dict[str, str]:
    """Name -> sha256 of every tensor. ModelError when the index is gone, broken or holds none."""
    file = directory / INDEX
    try:
        index: Any = json.loads(file.read_text(encoding="utf-8"))
        digests = index["sha256"]
        if set(digests) != set(index["weight_map"]):
            raise ValueError("not every tensor has a checksum")
        return {str(name): str(value) for name, value in digests.items()}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ModelError(f"{file}: no index with checksums: {type(e).__name__}: {e}; quantise again") from None


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
