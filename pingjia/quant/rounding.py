"""The two inner loops of calibrated rounding: in compiled code where it is there and the tensors are on the CPU.

The plain form in torch says what is computed; the compiled one sums in another order (the last bits of an error may
differ) and is about forty times as fast. Not here: the method around them (`gptq.py`), what a scale is tried for
(`clip.py`).

Shapes: N rows, B columns of a block or a group; a column lies together.
"""

from __future__ import annotations

import ctypes

import torch

from pingjia.quant import kernels

_LANES = 16


class _RoundBlock(ctypes.Structure):
    _fields_ = (
        ("num_rows", ctypes.c_int64), ("num_columns", ctypes.c_int64), ("weights", ctypes.c_void_p),
        ("owed", ctypes.c_void_p), ("root", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("values", ctypes.c_void_p),
        ("errors", ctypes.c_void_p), ("low", ctypes.c_float), ("high", ctypes.c_float),
    )  # fmt: skip


class _ScaleSearch(ctypes.Structure):
    _fields_ = (
        ("num_rows", ctypes.c_int64), ("num_columns", ctypes.c_int64), ("targets", ctypes.c_void_p),
        ("importance", ctypes.c_void_p), ("ratios", ctypes.c_void_p), ("num_ratios", ctypes.c_int64),
        ("best", ctypes.c_void_p), ("low", ctypes.c_float), ("high", ctypes.c_float),
    )  # fmt: skip


def is_compiled(tensor: torch.Tensor) -> bool:
    """Whether the compiled loops run for this tensor."""
    return tensor.device.type == "cpu" and kernels.available()


def round_block(
    weight_BN: torch.Tensor,
    owed_BN: torch.Tensor,
    root_BB: torch.Tensor,
    scale_BN: torch.Tensor,
    limits: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and errors, both float32 [B, N], of a block whose columns are rounded one after the other.

    `owed_BN`: what the errors of earlier columns have put into these components of e R.
    """
    num_columns, num_rows = weight_BN.shape
    weight, owed, scale = (_padded(t) for t in (weight_BN, owed_BN, scale_BN))
    root = root_BB.T.float().contiguous()
    values, errors = torch.empty_like(weight), torch.empty_like(weight)
    block = _RoundBlock(
        weight.shape[1], num_columns, weight.data_ptr(), owed.data_ptr(), root.data_ptr(), scale.data_ptr(),
        values.data_ptr(), errors.data_ptr(), *limits,
    )  # fmt: skip
    kernels.library().pj_round_block(ctypes.byref(block))
    return values[:, :num_rows], errors[:, :num_rows]


def best_scale(
    target_BN: torch.Tensor, importance_B: torch.Tensor, ratios: torch.Tensor, limits: tuple[int, int]
) -> torch.Tensor:
    """[N] float32, exact in float16: of `ratios` times the largest weight / -low the scale that loses least; or its
    least-squares fit, if that is better still. The squares are weighted by the columns' importance."""
    num_columns, num_rows = target_BN.shape
    target, importance = _padded(target_BN), importance_B.float().contiguous()
    best = torch.empty(target.shape[1])
    search = _ScaleSearch(
        target.shape[1], num_columns, target.data_ptr(), importance.data_ptr(), ratios.data_ptr(), len(ratios),
        best.data_ptr(), *limits,
    )  # fmt: skip
    kernels.library().pj_search_scales(ctypes.byref(search))
    return best[:num_rows]


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """float32, contiguous, rows filled up with zeros to a multiple of 16."""
    missing = -tensor.shape[1] % _LANES
    return torch.nn.functional.pad(tensor.float(), (0, missing)).contiguous()
