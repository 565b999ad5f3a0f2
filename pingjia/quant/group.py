"""INT4 and INT8 in groups of columns: the layout, the linear layers and embedding tables that keep them packed.

INT4: `weight` uint8 [N, M/2]: the LOW nibble holds an even column, the HIGH nibble the odd one after it; a nibble means
nibble - 8, so values lie in -8..7. INT8: `weight` int8 [N, M] of -127..127. `weight_scale` float16 [N, M/G]: one scale
per row and group of G columns, and weight = value * scale. This is our own layout, written by `pingjia quantize`; the
published per-row one is `rows.py`. Not here: choosing scales and values (`clip.py`, `gptq.py`), and the fast products
(`kernels/`).

Shapes: B rows of x, N output rows, M input columns, G columns of a group.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from pingjia.errors import ModelError
from pingjia.quant.formats import PackedEmbedding, PackedLinear
from pingjia.quant.rows import row_blocks
from pingjia.quant.settings import GROUP_SIZES


def group_size_for(num_columns: int, asked: int, name: str = "the matrix") -> int:
    """The largest of 32, 64, 128 that divides `num_columns` and is not above `asked`. Raises ModelError when none is.

    A network's narrow matrices may so get smaller groups than its wide ones.
    """
    if asked not in GROUP_SIZES:
        raise ModelError(f"group size {asked}: choose {', '.join(map(str, GROUP_SIZES))}")
    fitting = [g for g in GROUP_SIZES if g <= asked and num_columns % g == 0]
    if not fitting:
        raise ModelError(f"{name} has {num_columns} columns, which no group of 32 divides: use bits=8")
    return max(fitting)


def int8_group_size(num_columns: int, asked: int) -> int | None:
    """The same for INT8, which does without groups (None: a scale per row) where 32 does not divide the columns."""
    return group_size_for(num_columns, asked) if num_columns % min(GROUP_SIZES) == 0 else None


# ---- layout


def pack_groups(values_NM: torch.Tensor) -> torch.Tensor:
    """Integers [N, M] of -8..7 -> uint8 [N, M/2]."""
    nibbles = (values_NM + 8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_groups(packed_NP: torch.Tensor) -> torch.Tensor:
    """uint8 [N, M/2] -> int8 [N, M] of -8..7, columns in their own order."""
    both = torch.stack((packed_NP & 0xF, packed_NP >> 4), dim=-1).flatten(-2)
    return both.to(torch.int8) - 8


def dequantize_groups(
    packed_NP: torch.Tensor, scale_NG: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Packed rows (uint8: INT4, int8: INT8) -> float [N, M] of `dtype`; computed in float32, block by block."""
    is_int8 = packed_NP.dtype == torch.int8
    num_rows, num_columns = packed_NP.shape[0], packed_NP.shape[1] * (1 if is_int8 else 2)
    weight = torch.empty(num_rows, num_columns, dtype=dtype, device=packed_NP.device)
    for rows in row_blocks(num_rows, num_columns):
        values = packed_NP[rows] if is_int8 else unpack_groups(packed_NP[rows])
        grouped = values.float().unflatten(1, (scale_NG.shape[1], -1))
        weight[rows] = (grouped * scale_NG[rows].float()[..., None]).flatten(1)
    return weight


# ---- product


def group_product(x: torch.Tensor, weight_NP: torch.Tensor, scale_NG: torch.Tensor) -> torch.Tensor:
    """x [..., M] times a grouped matrix (uint8: INT4, int8: INT8) -> [..., N] of x's dtype.

    Plain torch; the gradient goes to x only. The matrix is widened about 1 MB at a time, never as a whole. On a CPU it
    computes in float32 whatever x is.
    """
    return _GroupProduct.apply(x, weight_NP, scale_NG)


class _GroupProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_NP: torch.Tensor, scale_NG: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight_NP, scale_NG)
        ctx.width = x.shape[-1]
        x_BM = _halves(x.reshape(-1, x.shape[-1]).to(_compute_dtype(x)), weight_NP)
        out_BN = x_BM.new_empty(x_BM.shape[0], weight_NP.shape[0])
        for rows in row_blocks(weight_NP.shape[0], x_BM.shape[1]):
            out_BN[:, rows] = x_BM @ _widen(weight_NP[rows], scale_NG[rows], x_BM.dtype).T
        return out_BN.to(x.dtype).view(*x.shape[:-1], weight_NP.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight_NP, scale_NG = ctx.saved_tensors
        grad_BN = grad.reshape(-1, grad.shape[-1]).to(_compute_dtype(grad))
        width = ctx.width
        grad_BM = grad_BN.new_zeros(grad_BN.shape[0], width)
        for rows in row_blocks(weight_NP.shape[0], width):
            grad_BM.addmm_(grad_BN[:, rows], _widen(weight_NP[rows], scale_NG[rows], grad_BN.dtype))
        if weight_NP.dtype == torch.uint8:
            grad_BM = torch.stack((grad_BM[:, : width // 2], grad_BM[:, width // 2 :]), dim=-1).flatten(1)
        return grad_BM.view(*grad.shape[:-1], width).to(grad.dtype), None, None


def _widen(packed_NP: torch.Tensor, scale_NG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Floats. INT4: all even columns, then all odd ones; interleaving them would cost more than reordering x does."""
    if packed_NP.dtype == torch.int8:
        values = packed_NP.to(dtype).unflatten(1, (scale_NG.shape[1], -1))
        return values.mul_(scale_NG.to(dtype)[..., None]).flatten(1)
    num_rows, half = packed_NP.shape
    wide = torch.empty(num_rows, 2, half, dtype=dtype, device=packed_NP.device)
    wide[:, 0] = packed_NP & 0xF
    wide[:, 1] = packed_NP >> 4
    grouped = wide.sub_(8).view(num_rows, 2, scale_NG.shape[1], -1)
    return grouped.mul_(scale_NG.to(dtype)[:, None, :, None]).view(num_rows, 2 * half)


def _halves(x_BM: torch.Tensor, weight_NP: torch.Tensor) -> torch.Tensor:
    """Columns of x in the order of `_widen`."""
    if weight_NP.dtype == torch.int8:
        return x_BM
    return torch.cat((x_BM[:, 0::2], x_BM[:, 1::2]), dim=1)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "cpu" else x.dtype


# ---- modules


class GroupLinear(PackedLinear):
    """One float16 scale per row and group of columns. Frozen: only the input gets a gradient."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group_size: int = 64,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate a float weight
        self.in_features, self.out_features = in_features, out_features
        groups = in_features // group_size_for(in_features, group_size)
        self.weight = nn.Parameter(self._zeros(device), requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(out_features, groups, dtype=torch.float16, device=device))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)

    @abstractmethod
    def _zeros(self, device: torch.device | str | None) -> torch.Tensor:
        """A stored matrix of zeros."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.in_features // self.weight_scale.shape[1] if self.tiles is None else self.tiles.group

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return group_product(x, self.weight, self.weight_scale)

    def _widened(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_groups(self.weight, self.weight_scale, dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


class GroupInt4Linear(GroupLinear):
    """4 bits per weight and the scales."""

    bits = 4

    def _zeros(self, device: torch.device | str | None) -> torch.Tensor:
        return torch.full((self.out_features, self.in_features // 2), 0x88, dtype=torch.uint8, device=device)


class GroupInt8Linear(GroupLinear):
    """8 bits per weight and the scales."""

    bits = 8

    def _zeros(self, device: torch.device | str | None) -> torch.Tensor:
        return torch.zeros(self.out_features, self.in_features, dtype=torch.int8, device=device)


class GroupEmbedding(PackedEmbedding):
    """The same as a table. `weight` and `weight_scale` may be those of a head, a `GroupLinear`."""

    def __init__(self, weight_NP: torch.Tensor, scale_NG: torch.Tensor) -> None:
        super().__init__(weight_NP, scale_NG, 4 if weight_NP.dtype == torch.uint8 else 8)

    def _widened(self, rows: torch.Tensor) -> torch.Tensor:
        return dequantize_groups(self.weight[rows], self.weight_scale[rows], self.out_dtype)
