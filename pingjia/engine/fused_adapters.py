"""An adapter's matrices as the compiled pass reads them: all in one piece of memory, layer after layer.

In half precision, divided by their largest value, 0.05 % off. One piece, because matrices that lie apart cost more time
to find than to read.

Shapes: I and O width of a linear, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pingjia.engine.lora import LoraWeights
from pingjia.quant.native import empty_bytes

_RANKS, _COLUMNS = 4, 16  # that lie together


@dataclass(frozen=True, slots=True)
class FusedLora:
    """`a` [R/4, I/16, 4, 16] and `b` [O/16, R, 16], padded with zeros; the delta is `factor` times what they give."""

    a: torch.Tensor
    b: torch.Tensor
    rank: int
    factor: float


def fuse(weights: Mapping[str, LoraWeights]) -> dict[str, FusedLora]:
    """Module path -> its matrices; the paths in the order in which they are computed."""
    sizes = [size for lora in weights.values() for size in _sizes(lora)]
    memory = empty_bytes(2 * sum(sizes)).view(torch.float16)
    parts = iter(memory.split(sizes))
    return {path: _fused(lora, next(parts), next(parts)) for path, lora in weights.items()}


def _shape(matrix: torch.Tensor) -> tuple[int, int]:
    """[R, width], padded."""
    return -(-matrix.shape[0] // _RANKS) * _RANKS, -(-matrix.shape[1] // _COLUMNS) * _COLUMNS


def _sizes(lora: LoraWeights) -> tuple[int, int]:
    return math.prod(_shape(lora.a_RI)), math.prod(_shape(lora.b_OR.T))


def _fused(lora: LoraWeights, a: torch.Tensor, b: torch.Tensor) -> FusedLora:
    (rank, _), (a_size, b_size) = _shape(lora.a_RI), (_largest(lora.a_RI), _largest(lora.b_OR))
    a = a.view(rank // _RANKS, -1, _RANKS, _COLUMNS)
    a.copy_(_padded(lora.a_RI / a_size).view(rank // _RANKS, _RANKS, -1, _COLUMNS).transpose(1, 2))
    b = b.view(-1, rank, _COLUMNS)
    b.copy_(_padded(lora.b_OR.T / b_size).view(rank, -1, _COLUMNS).transpose(0, 1))
    return FusedLora(a, b, rank, a_size * b_size)


def _largest(matrix: torch.Tensor) -> float:
    return float(matrix.abs().max()) or 1.0


def _padded(matrix: torch.Tensor) -> torch.Tensor:
    padded = torch.zeros(_shape(matrix))
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded
