"""x @ W^T where W is stored in few bits: W is widened to float32 a few rows at a time, never as a whole.

Plain torch, differentiable with respect to x (so adapters train over it); the reference for every faster kernel.
Products run in float32 on a CPU, where half precision is up to 200 times slower backward, and in x's dtype elsewhere.

Shapes: B rows of x, N output rows of W, M input columns, P stored columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pingjia.quant.rows import row_blocks

Widen = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
"""Stored rows [n, P] -> the same rows as float [n, M], scales left out."""


def widen_int8(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return rows.to(dtype)


def widen_int4(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """All even columns, then all odd ones: interleaving them would cost more than reordering x does."""
    half = rows.shape[1]
    wide = torch.empty(rows.shape[0], 2 * half, dtype=dtype, device=rows.device)
    wide[:, :half] = rows >> 4
    wide[:, half:] = (rows << 4) >> 4
    return wide


def int8_product(x: torch.Tensor, weight_NM: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    """x [..., M] times an INT8 matrix -> [..., N] of x's dtype."""
    return _scaled(x, weight_NM, scale_N, widen_int8)


def int4_product(x: torch.Tensor, weight_NP: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    """x [..., M] times an INT4 matrix [N, M/2] -> [..., N] of x's dtype."""
    return _scaled(torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1), weight_NP, scale_N, widen_int4)


def stored_product(x: torch.Tensor, weight_NM: torch.Tensor) -> torch.Tensor:
    """x [..., M] times a matrix stored in another float format -> [..., N] of x's dtype."""
    return StreamedProduct.apply(x, weight_NM, widen_int8).to(x.dtype)


def _scaled(x: torch.Tensor, weight: torch.Tensor, scale_N: torch.Tensor, widen: Widen) -> torch.Tensor:
    product = StreamedProduct.apply(x, weight, widen)
    return (product * scale_N.to(product.dtype)).to(x.dtype)


class StreamedProduct(torch.autograd.Function):
    """x [..., M], stored W [N, P] -> float [..., N]; the gradient goes to x only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_NP: torch.Tensor, widen: Widen) -> torch.Tensor:
        ctx.save_for_backward(weight_NP)
        ctx.widen, ctx.x_dtype = widen, x.dtype
        x_BM = x.reshape(-1, x.shape[-1]).to(_compute_dtype(x))
        out_BN = x_BM.new_empty(x_BM.shape[0], weight_NP.shape[0])
        for rows in row_blocks(weight_NP.shape[0], x_BM.shape[1]):
            out_BN[:, rows] = x_BM @ widen(weight_NP[rows], x_BM.dtype).T
        return out_BN.view(*x.shape[:-1], out_BN.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight_NP,) = ctx.saved_tensors
        grad_BN = grad.reshape(-1, grad.shape[-1])
        first = ctx.widen(weight_NP[:1], grad_BN.dtype)
        grad_BM = grad_BN.new_zeros(grad_BN.shape[0], first.shape[1])
        for rows in row_blocks(weight_NP.shape[0], first.shape[1]):
            grad_BM.addmm_(grad_BN[:, rows], ctx.widen(weight_NP[rows], grad_BN.dtype))
        return grad_BM.view(*grad.shape[:-1], grad_BM.shape[1]).to(ctx.x_dtype), None, None


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "cpu" else x.dtype
