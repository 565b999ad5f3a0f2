"""Another forward pass for one module, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def swapped_forward(module: torch.nn.Module, forward: Any) -> Iterator[None]:
    """While open, `module(...)` runs `forward(...)`. Its hooks run as ever, so sharded weights are there when used."""
    own = module.__dict__.get("forward")  # there when someone else has swapped it already
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
