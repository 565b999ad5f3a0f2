"""The learning rate of every update, as a pure function: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def rate_factor(step: int, num_steps: int, *, kind: str, warmup_ratio: float) -> float:
    """What the peak rate is multiplied by in update `step` (from 0) of `num_steps`, in (0, 1].

    A linear rise, then `kind` down to (nearly) zero. The first update already has a rate above zero, and so has the
    last: no update is wasted.
    """
    num_warmup = round(num_steps * warmup_ratio)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    left = (num_steps - step) / max(1, num_steps - num_warmup)  # 1 at the peak, just above 0 at the end
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return left
    return 0.5 * (1 - math.cos(math.pi * left))
