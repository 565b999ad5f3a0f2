"""Which scale a row, or a group of a row, gets.

Calibrated groups: the one whose rounding loses least, weighted squares compared over a short list. Not here: moving an
error on to other columns (`gptq.py`).

Shapes: N rows, G columns that share a scale.
"""

from __future__ import annotations

import torch

from pingjia.quant.rounding import best_scale, is_compiled

LOW, HIGH = -8, 7
# Of max|w| / 8. Above 1 the far end is reached at 7 rather than at -8; below it the largest weights are cut off.
_RATIOS = (8 / 7, 1.07, 1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.68, 0.6)
_SIGNED = torch.tensor([sign * ratio for ratio in _RATIOS for sign in (1.0, -1.0)])


def group_scale(target_GN: torch.Tensor, importance_G: torch.Tensor) -> torch.Tensor:
    """[N] float32, exact in float16: the scale of each row of one group, columns along the first axis.

    Values go from -8 to 7, so a scale may be negative: the -8 then serves the positive end. The best of the candidates
    is then fitted to the integers it gave (least squares) and kept if that is better still.
    """
    if is_compiled(target_GN):
        return best_scale(target_GN, importance_G, _SIGNED, (LOW, HIGH))
    importance_G1 = importance_G[:, None]
    largest_N = target_GN.abs().amax(0) / -LOW
    best = largest_N.new_zeros(largest_N.shape)
    least = torch.full_like(largest_N, torch.inf)
    for ratio in _SIGNED.tolist():
        best, least = _better(target_GN, importance_G1, ratio * largest_N, best, least)
    fitted = _fitted(target_GN, importance_G1, best)
    best, _ = _better(target_GN, importance_G1, fitted, best, least)
    return best


def nearest_scale(target_GN: torch.Tensor) -> torch.Tensor:
    """[N] float32, exact in float16: the largest weight of a row's group becomes -8, as in llama.cpp's Q4_0.

    Better than the least square error where nothing says which columns matter: on SmolLM2, groups of 32, KL 0.42
    against 0.47. The largest weights are the ones that must be right.
    """
    largest_N = target_GN.gather(0, target_GN.abs().argmax(0, keepdim=True))[0]
    return (largest_N / LOW).half().float()


def largest_scale(target_GN: torch.Tensor) -> torch.Tensor:
    """[N] float32, exact in float16, for INT8: the largest weight of a row's group becomes 127."""
    return (target_GN.abs().amax(0) / 127).half().float()


def row_scale(weight_NM: torch.Tensor) -> torch.Tensor:
    """[N] float32 for INT8: the largest weight of a row becomes 127."""
    return weight_NM.abs().amax(1).float() / 127


def divisor(scale: torch.Tensor) -> torch.Tensor:
    """The scale, or 1 where it is 0: a row of zeros rounds to zeros."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _better(
    target_GN: torch.Tensor,
    importance_G1: torch.Tensor,
    scale_N: torch.Tensor,
    best: torch.Tensor,
    least: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    scale_N = scale_N.half().float()
    rounded = (target_GN / divisor(scale_N)).round_().clamp_(LOW, HIGH).mul_(scale_N)
    loss = rounded.sub_(target_GN).square_().mul_(importance_G1).sum(0)
    found = loss < least
    return torch.where(found, scale_N, best), torch.where(found, loss, least)


def _fitted(target_GN: torch.Tensor, importance_G1: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    values = (target_GN / divisor(scale_N)).round_().clamp_(LOW, HIGH)
    weighted = values * importance_G1
    return (weighted * target_GN).sum(0) / divisor((weighted * values).sum(0))
