"""A float matrix -> the tensors that are stored of it, and how much its outputs changed.

Works on lots of rows, which round independently of each other, so that memory stays near that of the matrix.
Not here: which matrices get which width (`models/compress.py`), files (`shards.py`).

Shapes: N output rows, M input columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pingjia.quant.gptq import round_groups, round_groups_in_order, round_rows
from pingjia.quant.gram import Gram, root_of
from pingjia.quant.group import dequantize_groups, group_size_for, int8_group_size, pack_groups
from pingjia.quant.rows import dequantize_rows, quantize_rows
from pingjia.quant.settings import QuantizeSettings

_LOT_ELEMENTS = 2**25  # 128 MB in float32
_SAMPLED_ROWS = 256  # of each lot: enough for an error in two digits, and little beside the rounding itself


@dataclass(frozen=True, slots=True)
class Root:
    """The factor of the inputs' Gram matrix, and the order of columns it was made for (None: as they are)."""

    root_MM: torch.Tensor
    order_M: torch.Tensor | None = None

    @classmethod
    def of(cls, gram: Gram, settings: QuantizeSettings, name: str) -> Root:
        """Uses the Gram matrix up."""
        order = torch.argsort(gram.diagonal(), descending=True, stable=True) if settings.act_order else None
        return cls(root_of(gram.take(order), settings.damping, name), order)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """`weight` and `weight_scale` as stored. `relative_error`: of the outputs on the calibration text, root of the
    summed squares over that of the outputs themselves; without calibration, of the weights. On a sample of the rows."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    relative_error: float = 0.0

    def dequantize(self) -> torch.Tensor:
        """float32 [N, M]."""
        if self.weight_scale.dim() == 2:
            return dequantize_groups(self.weight, self.weight_scale)
        return dequantize_rows(self.weight, self.weight_scale, 8)

    def named(self, path: str) -> dict[str, torch.Tensor]:
        """As the tensors of the module at `path`."""
        return {f"{path}.weight": self.weight, f"{path}.weight_scale": self.weight_scale}


def pack_matrix(
    weight_NM: torch.Tensor, bits: int, settings: QuantizeSettings, root: Root | None, name: str = "the matrix"
) -> PackedMatrix:
    """Round and pack one matrix. Raises ModelError when no group divides its columns and it is to have 4 bits."""
    if settings.layout == "published":
        stored, scale_N = quantize_rows(weight_NM, bits)
        return PackedMatrix(stored, scale_N, _published_error(weight_NM, stored, scale_N, bits))
    group_size = _group_size(weight_NM.shape[1], bits, settings.group_size, name)
    lots = []
    error, size = 0.0, 0.0
    for rows in _lots(*weight_NM.shape):
        weight = weight_NM[rows].float()
        values, scale, lost = _round(weight, bits, group_size, root)
        lots.append((pack_groups(values) if bits == 4 else values, scale))
        some = slice(None, None, max(1, weight.shape[0] // _SAMPLED_ROWS))
        error += _squares(lost[some], root)
        size += _squares(weight[some], root)
    weight, scale = (torch.cat(parts) for parts in zip(*lots, strict=True))
    return PackedMatrix(weight, scale, (error / size) ** 0.5 if size else 0.0)


def _group_size(num_columns: int, bits: int, asked: int, name: str) -> int | None:
    return group_size_for(num_columns, asked, name) if bits == 4 else int8_group_size(num_columns, asked)


def _published_error(weight_NM: torch.Tensor, stored: torch.Tensor, scale_N: torch.Tensor, bits: int) -> float:
    some = slice(None, None, max(1, weight_NM.shape[0] // _SAMPLED_ROWS))
    weight = weight_NM[some].float()
    return float((weight - dequantize_rows(stored[some], scale_N[some], bits)).norm() / weight.norm())


def _lots(num_rows: int, num_columns: int) -> list[slice]:
    step = max(1, _LOT_ELEMENTS // num_columns)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _round(weight: torch.Tensor, bits: int, group_size: int | None, root: Root | None) -> tuple[torch.Tensor, ...]:
    if root is None or root.order_M is None:
        root_MM = None if root is None else root.root_MM
        return round_groups(weight, group_size, root_MM, bits) if group_size else round_rows(weight, root_MM)
    if group_size:
        return round_groups_in_order(weight, group_size, root.root_MM, root.order_M, bits)
    values, scale, lost = round_rows(weight[:, root.order_M], root.root_MM)
    back = torch.argsort(root.order_M)
    return values[:, back], scale, lost[:, back]


def _squares(rows_NM: torch.Tensor, root: Root | None) -> float:
    if root is None:
        return float(rows_NM.square().sum())
    ordered = rows_NM if root.order_M is None else rows_NM[:, root.order_M]
    return float((ordered @ root.root_MM).square().sum())
