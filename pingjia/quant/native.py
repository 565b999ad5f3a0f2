"""Packed matrices in the order the compiled kernels read, and torch operators over them. CPU only.

`Tiles` holds one matrix: the same bytes as the plain tensors, in another order, so it replaces them. In inference a
product rounds the activations to 8 bits (INT4 weights) or 16 (INT8 weights) with one scale per 32 columns; the error
bound is in docs/kernels.md. When the input needs a gradient the product is exact, with the weights widened to float32 a
few rows at a time, so that forward and backward belong to the same function. Not here: the layers (`tiled.py`), the C
side (`kernels/`).

Shapes: B rows of x, N output rows, M input columns, P stored columns, G groups of a row.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pingjia.errors import ModelError
from pingjia.quant import kernels
from pingjia.quant.rows import row_blocks

TILE_ROWS = 16
_MANY_BYTES = 1 << 22  # below, a matrix is not worth pages of its own
EXACT = 32  # activation bits of a product in float32
_EVEN_HIGH, _EVEN_LOW = 0, 1  # where a byte keeps its even column: published layout, grouped layout


@dataclass(eq=False)
class Tiles:
    """One packed matrix of N rows and M columns. Immutable; shared by a head and an embedding that are tied.

    `tiles` uint8, `scales` [N/16, G, 16] float16 or float32. `stored` and `scale_dtype` say what `plain()` gives back.
    """

    tiles: torch.Tensor
    scales: torch.Tensor
    bits: int
    n: int
    m: int
    group: int
    stored: torch.dtype
    scale_dtype: torch.dtype
    per_row: bool
    _plain: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, weight_NP: torch.Tensor, scale: torch.Tensor, bits: int) -> Tiles:
        """Reorder plain tensors: int8 rows in the published layout, uint8 ones in the grouped layout.

        scale [N] (one per row) or [N, G]. Raises ModelError for groups that are no multiple of 32 columns.
        """
        n, m = weight_NP.shape[0], weight_NP.shape[1] * 8 // bits
        group = m if scale.dim() == 1 else -(-m // scale.shape[1])
        if group < m and group % 32:
            raise ModelError(f"groups of {group} columns: the kernels take multiples of 32")
        tiles = empty_bytes(kernels.library().pj_tile_bytes(bits, n, m))
        plain = weight_NP.detach().contiguous()
        kernels.library().pj_pack(bits, _order(plain.dtype), n, m, plain.data_ptr(), tiles.data_ptr())
        kinds = (weight_NP.dtype, scale.dtype, scale.dim() == 1)
        return cls(tiles, _scale_tiles(scale.detach()), bits, n, m, group, *kinds)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plain": None}  # a copy must not hand out this one's tensors

    @property
    def num_bytes(self) -> int:
        return self.tiles.nbytes + self.scales.nbytes

    def plain(self) -> tuple[nn.Parameter, torch.Tensor]:
        """(weight, scale) as they were. Tied layers that ask one after the other get the same tensors."""
        weight, scale = (ref() for ref in self._plain) if self._plain else (None, None)
        if weight is None or scale is None:
            weight, scale = nn.Parameter(self._weight(), requires_grad=False), self._scale()
            self._plain = weakref.ref(weight), weakref.ref(scale)
        return weight, scale

    def _weight(self) -> torch.Tensor:
        weight = torch.empty(self.n, self.m * self.bits // 8, dtype=self.stored)
        order = _order(self.stored)
        kernels.library().pj_unpack(self.bits, order, self.n, self.m, self.tiles.data_ptr(), weight.data_ptr())
        return weight

    def _scale(self) -> torch.Tensor:
        scale_NG = self.scales.transpose(1, 2).flatten(0, 1)[: self.n].to(self.scale_dtype, copy=True)
        return scale_NG.flatten() if self.per_row else scale_NG

    @property
    def activation_bits(self) -> int:
        """8 beside 4-bit weights. 16 beside 8-bit ones, where rounding x to 8 bits would be most of the error."""
        return 8 if self.bits == 4 else 16

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """(bits, N, M, columns of a group), as the operators take them."""
        return self.bits, self.n, self.m, self.group

    def c_matrix(self, bias: torch.Tensor | None = None) -> kernels.CMatrix:
        """What the C side takes. Valid while this object and `bias` (float32, contiguous) live."""
        return _c_matrix(self.tiles, self.scales, bias, *self.layout)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows as floats: ids [...] -> float32 [..., M]. Raises IndexError outside the matrix."""
        out = packed_rows(ids.reshape(-1), self.tiles, self.scales, *self.layout)
        return out.view(*ids.shape, self.m)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The whole matrix as floats [N, M]."""
        weight = torch.empty(self.n, self.m, dtype=dtype)
        for rows in row_blocks(self.n, self.m):
            weight[rows] = self.rows(torch.arange(rows.start, rows.stop))
        return weight

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., M] -> [..., N] of x's dtype: x rounded to `activation_bits`, or exact when it needs a gradient."""
        exact = torch.is_grad_enabled() and x.requires_grad
        bits = EXACT if exact else self.activation_bits
        if not exact and type(x) is torch.Tensor and not torch.compiler.is_compiling():
            # Called as an operator it would cost 20 microseconds more.
            return _fast(x, self.tiles, self.scales, bias, *self.layout, bits)
        return packed_matmul(x, self.tiles, self.scales, bias, *self.layout, bits)


def empty_bytes(num_bytes: int) -> torch.Tensor:
    """uint8, in pages of 2 MB where the system has them: every product reads all of a matrix, and with pages of 4 KB a
    quarter of the time goes into finding them."""
    if num_bytes < _MANY_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _order(stored: torch.dtype) -> int:
    return _EVEN_LOW if stored == torch.uint8 else _EVEN_HIGH


def _scale_tiles(scale: torch.Tensor) -> torch.Tensor:
    """[N] or [N, G] -> [N/16, G, 16], rows padded with zeros; float16 stays, anything else becomes float32."""
    scale_NG = scale[:, None] if scale.dim() == 1 else scale
    kept = scale_NG if scale.dtype == torch.float16 and scale.dim() == 2 else scale_NG.float()
    padded = kept.new_zeros(-(-kept.shape[0] // TILE_ROWS) * TILE_ROWS, kept.shape[1])
    padded[: kept.shape[0]] = kept
    return padded.view(-1, TILE_ROWS, kept.shape[1]).transpose(1, 2).contiguous()


def _c_matrix(
    tiles: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, bits: int, n: int, m: int, group: int
) -> kernels.CMatrix:
    pointer = None if bias is None else bias.data_ptr()
    return kernels.CMatrix(bits, scales.element_size() * 8, n, m, group, tiles.data_ptr(), scales.data_ptr(), pointer)


def _fast(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    n: int,
    m: int,
    group: int,
    activation_bits: int,
) -> torch.Tensor:
    if x.shape[-1] != m or x.device.type != "cpu":
        raise RuntimeError(f"x is {list(x.shape)} on {x.device}; this matrix takes {m} columns on the CPU")
    x_BM = x.detach().reshape(-1, m).to(torch.float32).contiguous()
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    out_BN = torch.empty(x_BM.shape[0], n)
    matrix = _c_matrix(tiles, scales, bias, bits, n, m, group)
    arguments = (x_BM.data_ptr(), x_BM.shape[0], m, activation_bits == 16, out_BN.data_ptr(), n)
    kernels.library().pj_matmul(ctypes.byref(matrix), *arguments)
    return out_BN.view(*x.shape[:-1], n).to(x.dtype)


@torch.library.custom_op("pingjia::packed_rows", mutates_args=())
def packed_rows(
    ids: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, bits: int, n: int, m: int, group: int
) -> torch.Tensor:
    """Rows `ids` [K] of a packed matrix as float32 [K, M]."""
    ids = ids.to(torch.int64).contiguous()
    if ids.numel() and not ((ids >= 0) & (ids < n)).all():
        raise IndexError(f"rows {int(ids.min())} to {int(ids.max())} asked of a matrix with {n} rows")
    out = torch.empty(ids.numel(), m)
    matrix = _c_matrix(tiles, scales, None, bits, n, m, group)
    kernels.library().pj_rows(ctypes.byref(matrix), ids.data_ptr(), ids.numel(), out.data_ptr(), m)
    return out


@packed_rows.register_fake
def _(
    ids: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, bits: int, n: int, m: int, group: int
) -> torch.Tensor:
    return scales.new_empty(ids.numel(), m, dtype=torch.float32)


@torch.library.custom_op("pingjia::packed_matmul", mutates_args=())
def packed_matmul(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    n: int,
    m: int,
    group: int,
    activation_bits: int,
) -> torch.Tensor:
    """x [..., M] times a packed matrix -> [..., N] of x's dtype; x rounded to 8 or 16 bits, or not (32)."""
    if activation_bits != EXACT:
        return _fast(x, tiles, scales, bias, bits, n, m, group, activation_bits)
    x_BM = x.reshape(-1, m).to(torch.float32)
    out_BN = torch.empty(x_BM.shape[0], n)
    for rows in row_blocks(n, m):
        ids = torch.arange(rows.start, rows.stop)
        out_BN[:, rows] = x_BM @ packed_rows(ids, tiles, scales, bits, n, m, group).T
    if bias is not None:
        out_BN += bias
    return out_BN.view(*x.shape[:-1], n).to(x.dtype)


@packed_matmul.register_fake
def _(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    n: int,
    m: int,
    group: int,
    activation_bits: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], n)


@torch.library.custom_op("pingjia::packed_matmul_backward", mutates_args=())
def packed_matmul_backward(
    grad: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, bits: int, n: int, m: int, group: int
) -> torch.Tensor:
    """The gradient of the input: grad [..., N] @ W -> [..., M], W widened a few rows at a time."""
    grad_BN = grad.reshape(-1, n).to(torch.float32)
    out_BM = torch.zeros(grad_BN.shape[0], m)
    for rows in row_blocks(n, m):
        ids = torch.arange(rows.start, rows.stop)
        out_BM.addmm_(grad_BN[:, rows], packed_rows(ids, tiles, scales, bits, n, m, group))
    return out_BM.view(*grad.shape[:-1], m).to(grad.dtype)


@packed_matmul_backward.register_fake
def _(
    grad: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, bits: int, n: int, m: int, group: int
) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], m)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, tiles, scales, _, *layout, _ = inputs
    ctx.save_for_backward(tiles, scales)
    ctx.layout = layout


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return packed_matmul_backward(grad, *ctx.saved_tensors, *ctx.layout), *[None] * 8


packed_matmul.register_autograd(_backward, setup_context=_keep)
