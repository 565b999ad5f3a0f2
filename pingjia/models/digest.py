"""A name for "these very weights, in this number format": two networks with one digest answer alike.

Unlike `fingerprint.py`, which recognises a base whatever it is packed as, this changes with any value of any tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

_BLOCK = 4096
_NUM_BLOCKS = 16


def weights_digest(model: torch.nn.Module) -> str:
    """sha256 over every tensor's name, shape, type, the sum of its words and some blocks of its bytes.

    The sum meets every byte at the speed of memory, where hashing all of them would take seconds per gigabyte; the
    blocks tell apart what has one sum.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
        for part in _parts(tensor.detach().cpu().contiguous().view(-1)):
            digest.update(part)
    return digest.hexdigest()


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0])


def _parts(flat: torch.Tensor) -> Iterator[bytes]:
    data = flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)
    whole = data.numel() // 8 * 8
    if whole and data.storage_offset() % 8 == 0:
        words = data[:whole].view(torch.int64)
        yield int(words.sum()).to_bytes(8, "little", signed=True)
        data_left = data[whole:]
    else:
        yield int(data.sum(dtype=torch.int64)).to_bytes(8, "little", signed=True)
        data_left = data[:0]
    yield data_left.numpy().tobytes()
    step = max(_BLOCK, data.numel() // _NUM_BLOCKS)
    for start in range(0, data.numel(), step):
        yield data[start : start + _BLOCK].numpy().tobytes()
