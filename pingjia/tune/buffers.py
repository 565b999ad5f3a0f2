"""Large float32 matrices on a CPU whose memory is used again as soon as nobody holds them. No arithmetic.

glibc gives a large block back to the system when it is freed, and the system clears every page of the next one: a fifth
of the time of an update. Told to keep them, it keeps them in pieces that fit nothing (`relief.return_freed_memory`).
Matrices of an update have few widths, so here all of one width share their blocks. A block comes back when the last
tensor over it is gone, whoever held it; nobody has to say so.
"""

from __future__ import annotations

import weakref
from collections import defaultdict

import torch

LEAST_BYTES = 2**20
"""Smaller ones glibc keeps by itself."""


class Buffers:
    """Free blocks by width. `num_free`: how many there are."""

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._rows: dict[int, int] = {}  # width: rows of its blocks
        self._era = 0

    @property
    def num_free(self) -> int:
        return sum(map(len, self._free.values()))

    def empty(self, like: torch.Tensor, width: int) -> torch.Tensor:
        """An uninitialised matrix with the rows, format and device of `like`."""
        num_rows = like.shape[0]
        if like.device.type != "cpu" or like.dtype != torch.float32 or 4 * num_rows * width < LEAST_BYTES:
            return like.new_empty(num_rows, width)
        if num_rows > self._rows.get(width, 0):
            self._rows[width] = num_rows
            self._free[width].clear()
        free = self._free[width]
        block = free.pop() if free else torch.empty(self._rows[width] * width)
        array = block.numpy()[: num_rows * width].reshape(num_rows, width)
        weakref.finalize(array, self._take_back, block, width, self._era).atexit = False
        return torch.from_numpy(array)

    def clear(self) -> None:
        """Give up every free block, and those that are in use as soon as they are free."""
        self._free.clear()
        self._rows.clear()
        self._era += 1

    def _take_back(self, block: torch.Tensor, width: int, era: int) -> None:
        if era == self._era and block.numel() == self._rows[width] * width:
            self._free[width].append(block)


BUFFERS = Buffers()
"""Of the process, as the allocator is that they stand in for."""
