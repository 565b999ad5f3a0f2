"""Rounding columns one after another, each making up for the errors of those before it (GPTQ, arXiv:2210.17323).

With the inputs' Gram matrix written as R R^T, R upper triangular, the squared output error of a row e of errors is
|e R|^2, and component j of e R depends on e_0..e_j only. So column j is rounded where that component would be zero.
This is the published method without its inverse: one Cholesky factor instead of three.

Not here: the Gram matrix and R (`gram.py`), choosing a scale (`clip.py`), bytes (`group.py`).

Shapes: N rows, M columns, B columns of a block (for INT4 the group), transposed inside a block so that a column lies
together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pingjia.quant.clip import HIGH, LOW, divisor, group_scale, largest_scale, nearest_scale, row_scale
from pingjia.quant.rounding import is_compiled, round_block
from pingjia.quant.rows import row_blocks

_INT8_BLOCK = 128
_LIMITS = {4: (LOW, HIGH), 8: (-127, 127)}
Scales = Callable[[slice, torch.Tensor, torch.Tensor], torch.Tensor]
"""(columns, what they should be [B, N], importance [B]) -> scale [N] or [B, N]."""


def round_groups(
    weight_NM: torch.Tensor, group_size: int, root_MM: torch.Tensor | None, bits: int = 4
) -> tuple[torch.Tensor, ...]:
    """A scale per group: (values int8 [N, M], scale float16 [N, M/G], error float32 [N, M]).

    Values are -8..7 with 4 bits and -127..127 with 8. `root_MM` None rounds every weight to its nearest value.
    Otherwise a group's scale is chosen for what its columns should be by then, errors of earlier columns made up for.
    """
    if root_MM is None:
        return _groups_to_nearest(weight_NM, group_size, bits)
    scales_NG = weight_NM.new_empty(weight_NM.shape[0], weight_NM.shape[1] // group_size, dtype=torch.float16)

    def scales(columns: slice, target_BN: torch.Tensor, importance_B: torch.Tensor) -> torch.Tensor:
        scale_N = _scale(target_BN, importance_B, bits)
        scales_NG[:, columns.start // group_size] = scale_N.half()
        return scale_N

    values_NM, error_NM = _round(weight_NM, root_MM, group_size, scales, _LIMITS[bits])
    return values_NM, scales_NG, error_NM


def _groups_to_nearest(weight_NM: torch.Tensor, group_size: int, bits: int) -> tuple[torch.Tensor, ...]:
    """About 1 MB of rows at a time: they stay in the cache from the search for a scale to the error."""
    values_NM, error_NM = (
        torch.empty_like(weight_NM, dtype=torch.int8),
        torch.empty_like(weight_NM, dtype=torch.float32),
    )
    scales = []
    for rows in row_blocks(*weight_NM.shape):
        weight_CG = weight_NM[rows].float().reshape(-1, group_size)  # every group a row
        scale_C = largest_scale(weight_CG.T) if bits == 8 else nearest_scale(weight_CG.T)
        values_CG = (weight_CG / divisor(scale_C)[:, None]).round_().clamp_(*_LIMITS[bits])
        values_NM[rows] = values_CG.view(-1, weight_NM.shape[1]).to(torch.int8)
        error_NM[rows] = (weight_CG - values_CG * scale_C[:, None]).view(-1, weight_NM.shape[1])
        scales.append(scale_C.half().view(-1, weight_NM.shape[1] // group_size))
    return values_NM, torch.cat(scales), error_NM


def _scale(target_BN: torch.Tensor, importance_B: torch.Tensor, bits: int) -> torch.Tensor:
    """[N] float32, exact in float16, for one group. With 8 bits cutting off the largest weights gains nothing."""
    return largest_scale(target_BN) if bits == 8 else group_scale(target_BN, importance_B)


def round_groups_in_order(
    weight_NM: torch.Tensor, group_size: int, root_MM: torch.Tensor, order_M: torch.Tensor, bits: int = 4
) -> tuple[torch.Tensor, ...]:
    """`round_groups` with columns taken in `order_M`, for which `root_MM` was made; scales are chosen beforehand."""
    importance_M = torch.empty_like(root_MM.diagonal())
    importance_M[order_M] = root_MM.diagonal().square()
    groups = weight_NM.T.unflatten(0, (-1, group_size)), importance_M.view(-1, group_size)
    scales_NG = torch.stack([_scale(w.float(), i, bits) for w, i in zip(*groups, strict=True)], dim=1)
    group_M = order_M // group_size

    def scales(columns: slice, target_BN: torch.Tensor, importance_B: torch.Tensor) -> torch.Tensor:
        return scales_NG[:, group_M[columns]].T

    values_NM, error_NM = _round(weight_NM[:, order_M], root_MM, group_size, scales, _LIMITS[bits])
    back_M = torch.argsort(order_M)
    return values_NM[:, back_M], scales_NG.half(), error_NM[:, back_M]


def round_rows(weight_NM: torch.Tensor, root_MM: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """INT8 with a scale per row: (values int8 [N, M] of -127..127, scale float32 [N], error float32 [N, M])."""
    scale_N = row_scale(weight_NM)
    values_NM, error_NM = _round(weight_NM, root_MM, _INT8_BLOCK, lambda *_: scale_N, (-127, 127))
    return values_NM, scale_N, error_NM


def _round(
    weight_NM: torch.Tensor, root_MM: torch.Tensor | None, block: int, scales: Scales, limits: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, and errors weight - value * scale."""
    values_NM = torch.empty_like(weight_NM, dtype=torch.int8)
    error_NM = torch.empty_like(weight_NM, dtype=torch.float32)
    for start in range(0, weight_NM.shape[1], block):
        columns = slice(start, min(start + block, weight_NM.shape[1]))
        weight_BN = weight_NM[:, columns].T.float().contiguous()
        if root_MM is None:
            values_BN, error_BN = _nearest(weight_BN, columns, scales, limits)
        else:
            owed_BN = (error_NM[:, :start] @ root_MM[:start, columns]).T.contiguous()
            values_BN, error_BN = _fed_back(weight_BN, owed_BN, root_MM[columns, columns], columns, scales, limits)
        values_NM[:, columns], error_NM[:, columns] = values_BN.T, error_BN.T
    return values_NM, error_NM


def _nearest(
    weight_BN: torch.Tensor, columns: slice, scales: Scales, limits: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = scales(columns, weight_BN, torch.ones_like(weight_BN[:, 0]))
    values_BN = (weight_BN / divisor(scale)).round_().clamp_(*limits)
    return values_BN, weight_BN - values_BN * scale


def _fed_back(
    weight_BN: torch.Tensor,
    owed_BN: torch.Tensor,
    root_BB: torch.Tensor,
    columns: slice,
    scales: Scales,
    limits: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block. `owed_BN`: what the errors of earlier columns have put into these components of e R."""
    diagonal_B = root_BB.diagonal()
    made_up_BN = torch.linalg.solve_triangular(root_BB.T, owed_BN, upper=False)
    scale = scales(columns, weight_BN + made_up_BN, diagonal_B.square())
    scale_BN = scale.expand_as(weight_BN)
    if is_compiled(weight_BN):
        return round_block(weight_BN, owed_BN, root_BB, scale_BN, limits)
    divisor_BN = divisor(scale_BN)
    values_BN, error_BN = torch.empty_like(weight_BN), torch.empty_like(weight_BN)
    for j in range(weight_BN.shape[0]):
        owed_N = owed_BN[j] if j == 0 else torch.addmv(owed_BN[j], error_BN[:j].T, root_BB[:j, j])
        wanted_N = weight_BN[j] + owed_N / diagonal_B[j]
        values_BN[j] = (wanted_N / divisor_BN[j]).round_().clamp_(*limits)
        error_BN[j] = weight_BN[j] - values_BN[j] * scale_BN[j]
    return values_BN, error_BN
