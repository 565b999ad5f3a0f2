"""Keys and values of all pages in the order the compiled attention reads them. Which page is whose: pages.py.

Keys of a page lie column by column (all tokens of column 0, then of column 1, ...), so that one register holds the same
column of 16 tokens. Not here: the pool of the torch path (kv.py).

Shapes: P pages, Z tokens per page, K key/value heads, D head size.
"""

from __future__ import annotations

import torch

from pingjia.engine.kv import LayerShape, zero_pages


class FusedPool:
    """Keys and values of all layers, and for INT8 their scales, each in one tensor; allocated once.

    k[i], v[i], k_scale[i], v_scale[i] are layer i's part. Every layer must have the same shape.
    """

    def __init__(self, layers: dict[int, LayerShape], num_pages: int, page_size: int) -> None:
        shape = next(iter(layers.values()))
        assert all(other == shape for other in layers.values()), "the compiled pass knows layers of one shape only"
        self.page_size, self.dtype, self.device = page_size, shape.stored, shape.device
        outer, heads, size = (len(layers), num_pages), shape.num_kv_heads, shape.head_dim
        k = zero_pages(shape, (*outer, heads, size, page_size))
        v = zero_pages(shape, (*outer, heads, page_size, size))
        self._tensors = [k, v]
        self.k, self.v = dict(zip(layers, k, strict=True)), dict(zip(layers, v, strict=True))
        self.k_scale: dict[int, torch.Tensor] = {}
        self.v_scale: dict[int, torch.Tensor] = {}
        if self.dtype == torch.int8:
            scales = [torch.zeros(*outer, heads, page_size) for _ in self._tensors]
            self._tensors += scales
            self.k_scale, self.v_scale = (dict(zip(layers, both, strict=True)) for both in scales)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors)

    def scrub(self, pages: list[int]) -> None:
        """Forget the content of pages that may hold not-a-numbers."""
        for tensor in self._tensors:
            tensor[:, pages] = 0

    def copy(self, pages: list[tuple[int, int]]) -> None:
        """Copy whole pages, (from, to) each, in every layer; all are read before any is written."""
        if not pages:
            return
        sources, targets = [list(side) for side in zip(*pages, strict=True)]
        for tensor in self._tensors:
            tensor[:, targets] = tensor[:, sources]
