"""The tensors behind the pages, and attention over them. Which page is whose is decided in pages.py.

Shapes: N sequences that decode, T tokens of the step, S keys of a sequence, P pages, Z tokens per page, H query heads,
K key/value heads, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from pingjia.engine.sequence import Slice
from pingjia.models.attention import sdpa
from pingjia.models.device import free_bytes as device_free_bytes

_CGROUP_MAX = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps per token: keys and values of `num_kv_heads` x `head_dim` each.

    dtype: what the network computes in. stored: what pages hold; for int8 a float32 scale per token and head beside it.
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    kept_as: torch.dtype | None = None

    @property
    def stored(self) -> torch.dtype:
        return self.kept_as or self.dtype

    @property
    def bytes_per_token(self) -> int:
        scale = torch.float32.itemsize if self.stored == torch.int8 else 0
        return 2 * self.num_kv_heads * (self.head_dim * self.stored.itemsize + scale)


def kept_as(layers: dict[int, LayerShape], stored: torch.dtype) -> dict[int, LayerShape]:
    """The same layers with pages of another number format."""
    return {index: replace(shape, kept_as=stored) for index, shape in layers.items()}


@dataclass(slots=True)
class ShapeProbe:
    """A PackedBatch that keeps nothing but the shapes of the keys it is shown: no config field has to be trusted."""

    layers: dict[int, LayerShape] = field(default_factory=dict)

    def attend(
        self,
        layer_idx: int,
        q_BHTD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        self.layers[layer_idx] = LayerShape(k_BKTD.shape[1], k_BKTD.shape[3], k_BKTD.dtype, k_BKTD.device)
        return torch.zeros_like(q_BHTD).transpose(1, 2)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device` now; on the CPU also no more than this process's container may still take."""
    free = device_free_bytes(device)
    if device.type != "cpu":
        return free
    try:
        limit = int(_CGROUP_MAX.read_text())
        return min(free, max(limit - int(_CGROUP_USED.read_text()), 0))
    except (OSError, ValueError):  # no cgroup, or "max": no limit
        return free


class KVPool:
    """Keys and values of all pages, allocated once. Layer i: k[i], v[i] of shape [P, Z, K, D].

    For INT8 also k_scale[i], v_scale[i] of shape [P, Z, K, 1]. `dtype` is what goes in and comes out.
    """

    def __init__(self, layers: dict[int, LayerShape], num_pages: int, page_size: int) -> None:
        first = next(iter(layers.values()))
        self.page_size, self.dtype, self.device = page_size, first.dtype, first.device
        self.rounds = first.stored != first.dtype
        sizes = {i: (num_pages, page_size, s.num_kv_heads, s.head_dim) for i, s in layers.items()}
        self.k = {i: zero_pages(shape, sizes[i]) for i, shape in layers.items()}
        self.v = {i: zero_pages(shape, sizes[i]) for i, shape in layers.items()}
        self.k_scale: dict[int, torch.Tensor] = {}
        self.v_scale: dict[int, torch.Tensor] = {}
        if first.stored == torch.int8:
            for scales in (self.k_scale, self.v_scale):
                scales |= {i: torch.zeros(*size[:3], 1, device=self.device) for i, size in sizes.items()}
        # One layer's gathered keys and values at a time: without these buffers every gather of more than some MB asks
        # the kernel for fresh memory, which measured ten times slower than the copy itself.
        self._scratch = {name: torch.empty(0) for name in "kv"}

    def write(self, layer_idx: int, slots_T: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> None:
        self._write(self.k[layer_idx], self.k_scale.get(layer_idx), slots_T, k_TKD)
        self._write(self.v[layer_idx], self.v_scale.get(layer_idx), slots_T, v_TKD)

    @staticmethod
    def _write(
        pages_PZKD: torch.Tensor, scales_PZK1: torch.Tensor | None, slots_T: torch.Tensor, x_TKD: torch.Tensor
    ) -> None:
        if scales_PZK1 is not None:
            x_TKD, scale_TK1 = _to_int8(x_TKD)
            scales_PZK1.flatten(0, 1).index_copy_(0, slots_T, scale_TK1)
        pages_PZKD.flatten(0, 1).index_copy_(0, slots_T, x_TKD.to(pages_PZKD.dtype))

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for part in (self.k, self.v, self.k_scale, self.v_scale) for tensor in part.values()]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def scrub(self, pages: list[int]) -> None:
        """Forget the content of pages that may hold not-a-numbers: masked keys are still multiplied, by zero."""
        for tensor in self._tensors():
            tensor[pages] = 0

    def copy(self, pages: list[tuple[int, int]]) -> None:
        """Copy whole pages, (from, to) each, in every layer; all are read before any is written."""
        if not pages:
            return
        sources, targets = [list(side) for side in zip(*pages, strict=True)]
        for tensor in self._tensors():
            tensor[targets] = tensor[sources]

    def gather(self, layer_idx: int, pages_NP: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [N, K, S, D] of the first `num_keys` tokens on these pages; valid until the next gather."""
        return (
            self._widen(
                self._gather("k", self.k[layer_idx], pages_NP), self.k_scale.get(layer_idx), pages_NP, num_keys
            ),
            self._widen(
                self._gather("v", self.v[layer_idx], pages_NP), self.v_scale.get(layer_idx), pages_NP, num_keys
            ),
        )

    def _widen(
        self, x_NKSD: torch.Tensor, scales_PZK1: torch.Tensor | None, pages_NP: torch.Tensor, num_keys: int
    ) -> torch.Tensor:
        x_NKSD = x_NKSD[:, :, :num_keys].to(self.dtype)
        if scales_PZK1 is None:
            return x_NKSD
        scale_NKS1 = scales_PZK1[pages_NP].flatten(1, 2).transpose(1, 2)[:, :, :num_keys]
        return x_NKSD * scale_NKS1.to(self.dtype)

    def _gather(self, name: str, pool_PZKD: torch.Tensor, pages_NP: torch.Tensor) -> torch.Tensor:
        shape = (pages_NP.numel(), *pool_PZKD.shape[1:])
        size = pages_NP.numel() * pool_PZKD[0].numel()
        scratch = self._scratch[name]
        if scratch.numel() < size or scratch.dtype != pool_PZKD.dtype:
            scratch = self._scratch[name] = pool_PZKD.new_empty(size + size // 4)
        out = scratch[:size].view(shape)
        torch.index_select(pool_PZKD, 0, pages_NP.flatten(), out=out)
        return out.view(pages_NP.shape[0], -1, *shape[2:]).transpose(1, 2)


def _to_int8(x_TKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded to nearest, and the scale of every token and head [T, K, 1]. A not-a-number stays one, in the scale."""
    scale_TK1 = x_TKD.float().abs().amax(-1, keepdim=True) / 127
    rounded = (x_TKD / torch.where(scale_TK1 > 0, scale_TK1, 1.0)).round_().nan_to_num_(0.0)
    return rounded.to(torch.int8), scale_TK1


def zero_pages(shape: LayerShape, size: tuple[int, ...]) -> torch.Tensor:
    """Zeros, because the unused end of a page is read too, and masked: a stale not-a-number would survive the mask."""
    if shape.device.type != "cpu":
        return torch.zeros(size, dtype=shape.stored, device=shape.device)
    # numpy leaves zeroing to the system: a page costs memory from its first use on, while torch.zeros touches all.
    zeros = torch.from_numpy(np.zeros(math.prod(size) * shape.stored.itemsize, np.uint8))
    return zeros.view(shape.stored).view(size)


@dataclass(frozen=True, slots=True)
class Decodes:
    """Rows first..last-1 of the step are one token each, of sequences with about as many keys."""

    first: int
    last: int
    pages_NP: torch.Tensor
    num_keys: int
    mask_N11S: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Prefill:
    """Rows first..last-1 of the step are one piece of one sequence. Without `pages_1P` it has no past."""

    first: int
    last: int
    pages_1P: torch.Tensor | None
    num_keys: int
    mask_TS: torch.Tensor | None


class PagedBatch:
    """The pieces of one step laid end to end: a models.attention.PackedBatch over pages.

    Rows are in the order of `rows`: decodes by number of pages, then the prefills.
    """

    def __init__(self, pool: KVPool, slices: list[Slice]) -> None:
        self._pool = pool
        self.rows = sorted(slices, key=_decodes_by_pages)
        self._slots_T = _slots(self.rows, pool.page_size).to(pool.device)
        self._parts = _parts(self.rows, pool)

    def attend(
        self,
        layer_idx: int,
        q_BHTD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """Write the new keys and values to their pages and let every row see what it may; o_BTHD."""
        self._pool.write(layer_idx, self._slots_T, k_BKTD[0].transpose(0, 1), v_BKTD[0].transpose(0, 1))
        outputs = [self._attend_part(part, layer_idx, q_BHTD, k_BKTD, v_BKTD, scaling) for part in self._parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _attend_part(
        self, part: Decodes | Prefill, layer_idx: int,
        q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, scaling: float,
    ) -> torch.Tensor:  # fmt: skip
        rows = slice(part.first, part.last)
        if isinstance(part, Decodes):
            k_NKSD, v_NKSD = self._pool.gather(layer_idx, part.pages_NP, part.num_keys)
            q_NH1D = q_BHTD[:, :, rows].permute(2, 1, 0, 3)
            o_NH1D = sdpa(q_NH1D, k_NKSD, v_NKSD, mask=part.mask_N11S, is_causal=False, scaling=scaling)
            return o_NH1D.permute(2, 0, 1, 3)
        if part.pages_1P is None:
            k, v = k_BKTD[:, :, rows], v_BKTD[:, :, rows]
        else:
            k, v = self._pool.gather(layer_idx, part.pages_1P, part.num_keys)
        is_causal = part.mask_TS is None
        return sdpa(q_BHTD[:, :, rows], k, v, mask=part.mask_TS, is_causal=is_causal, scaling=scaling).transpose(1, 2)


def _decodes_by_pages(piece: Slice) -> tuple[bool, int]:
    is_prefill = piece.num_tokens > 1
    return is_prefill, 0 if is_prefill else piece.stop


def _slots(rows: list[Slice], page_size: int) -> torch.Tensor:
    """int64 [T]: where each token's keys and values go, counted in tokens from the start of the pool."""
    slots: list[int] = []
    for piece in rows:
        pages = piece.sequence.pages
        slots.extend(pages[i // page_size] * page_size + i % page_size for i in range(piece.start, piece.stop))
    return torch.tensor(slots)


def _parts(rows: list[Slice], pool: KVPool) -> list[Decodes | Prefill]:
    decodes = [piece for piece in rows if piece.num_tokens == 1]
    parts: list[Decodes | Prefill] = []
    for first, last in pairwise(_group_ends([-(-d.stop // pool.page_size) for d in decodes])):
        parts.append(_decodes(rows[first:last], first, pool))
    start = len(decodes)
    for piece in rows[start:]:
        parts.append(_prefill(piece, start, pool))
        start += piece.num_tokens
    return parts


def _group_ends(num_pages: list[int]) -> list[int]:
    """Cut an ascending list where padding to the last of a group would more than double the first: 0, ..., len."""
    ends = [0]
    for i, pages in enumerate(num_pages):
        if pages > 2 * num_pages[ends[-1]] + 4:
            ends.append(i)
    return [*ends, len(num_pages)] if num_pages else []


def _decodes(rows: list[Slice], first: int, pool: KVPool) -> Decodes:
    lengths = [piece.stop for piece in rows]
    width = -(-max(lengths) // pool.page_size)
    # Page 0 stands in where a shorter sequence has none; the mask hides it.
    table = [(piece.sequence.pages + [0] * width)[:width] for piece in rows]
    mask = None
    if min(lengths) < max(lengths):
        mask = _additive(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None, None, None], pool)
    return Decodes(first, first + len(rows), torch.tensor(table, device=pool.device), max(lengths), mask)


def _prefill(piece: Slice, first: int, pool: KVPool) -> Prefill:
    last, prefix_len = first + piece.num_tokens, piece.sequence.prefix_len
    two_way = piece.start + 1 < prefix_len
    # A pool that rounds is read by every piece, so that the result is the same however a prompt was cut.
    reads = piece.start > 0 or pool.rounds
    mask = _additive(visible(piece.start, piece.stop, prefix_len), pool) if piece.start or two_way else None
    if not reads:
        return Prefill(first, last, None, piece.stop, mask)
    pages = piece.sequence.pages[: -(-piece.stop // pool.page_size)]
    return Prefill(first, last, torch.tensor([pages], device=pool.device), piece.stop, mask)


def visible(start: int, stop: int, prefix_len: int) -> torch.Tensor:
    """bool [stop - start, stop]: the keys that tokens start..stop-1 may see: those before, and the two-way prefix."""
    assert start >= prefix_len or stop >= prefix_len, "a two-way prefix must not be cut"
    key = torch.arange(stop)
    return (key <= torch.arange(start, stop)[:, None]) | (key < prefix_len)


def _additive(seen: torch.Tensor, pool: KVPool) -> torch.Tensor:
    """0 where seen, -inf elsewhere: made once per step, so that no layer has to convert a bool mask."""
    return torch.zeros(seen.shape, dtype=pool.dtype).masked_fill_(~seen, -torch.inf).to(pool.device)
