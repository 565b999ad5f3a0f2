"""The learning rate of every update, as a pure function: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def learning_rate_at(step: int, num_steps: int, *, peak: float, kind: str, warmup_ratio: float) -> float:
    """Rate of update `step` (from 0) of `num_steps`: a linear rise, then `kind` down to (nearly) zero.

    The first update already has a rate above zero, and so has the last: no update is wasted.
    """
    num_warmup = round(num_steps * warmup_ratio)
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    left = (num_steps - step) / max(1, num_steps - num_warmup)  # 1 at the peak, just above 0 at the end
    if kind == "constant":
        return peak
    if kind == "linear":
        return peak * left
    return peak * 0.5 * (1 - math.cos(math.pi * left))
