"""Keys and values of all pages in the order the compiled attention reads them. Which page is whose: pages.py.

Keys of a page lie column by column (all tokens of column 0, then of column 1, ...), so that one register holds the same
column of 16 tokens. Not here: the pool of the torch path (kv.py).

Shapes: P pages, Z tokens per page, K key/value heads, D head size.
"""

from __future__ import annotations

import torch

from pingjia.engine.kv import LayerShape, zero_pages


class FusedPool:
    """One tensor of keys and one of values per layer, and for INT8 their scales; allocated once."""

    def __init__(self, layers: dict[int, LayerShape], num_pages: int, page_size: int) -> None:
        shape = next(iter(layers.values()))
        self.page_size, self.dtype, self.device = page_size, shape.stored, shape.device
        self.k = {i: zero_pages(s, (num_pages, s.num_kv_heads, s.head_dim, page_size)) for i, s in layers.items()}
        self.v = {i: zero_pages(s, (num_pages, s.num_kv_heads, page_size, s.head_dim)) for i, s in layers.items()}
        self.k_scale: dict[int, torch.Tensor] = {}
        self.v_scale: dict[int, torch.Tensor] = {}
        if self.dtype == torch.int8:
            for scales in (self.k_scale, self.v_scale):
                scales |= {i: torch.zeros(num_pages, s.num_kv_heads, page_size) for i, s in layers.items()}

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for part in (self.k, self.v, self.k_scale, self.v_scale) for tensor in part.values()]

    def scrub(self, pages: list[int]) -> None:
        """Forget the content of pages that may hold not-a-numbers."""
        for tensor in self._tensors():
            tensor[pages] = 0

    def copy(self, pages: list[tuple[int, int]]) -> None:
        """Copy whole pages, (from, to) each, in every layer: what a forked answer goes on from."""
        sources, targets = [list(side) for side in zip(*pages, strict=True)] if pages else ([], [])
        for tensor in self._tensors():
            tensor[targets] = tensor[sources]
