"""What a linear's inputs looked like: the Gram matrix of its calibration inputs, and its triangular root.

Not here: rounding (`gptq.py`), running a network over calibration text (`models/compress.py`).

Shapes: T tokens, M input columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pingjia.errors import ModelError

_BLOCK = 1024  # rows of a Gram matrix that are summed at a time, from their diagonal on


class Gram:
    """The sum of x x^T over all inputs seen, float32 [M, M]. Only what lies on and right of its diagonal is summed."""

    def __init__(self, num_columns: int, device: torch.device | str = "cpu") -> None:
        self._matrix_MM = torch.zeros(num_columns, num_columns, device=device)
        self.num_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """x [..., M]."""
        x_TM = x.reshape(-1, x.shape[-1]).float()
        for start in range(0, x_TM.shape[1], _BLOCK):
            rows = slice(start, start + _BLOCK)
            self._matrix_MM[rows, start:].addmm_(x_TM[:, rows].T, x_TM[:, start:])
        self.num_tokens += x_TM.shape[0]

    def diagonal(self) -> torch.Tensor:
        """[M]: the summed squares of every column."""
        return self._matrix_MM.diagonal()

    def take(self, order_M: torch.Tensor | None = None) -> torch.Tensor:
        """The matrix, its columns in another order if one is given, and forget it: it may take a gigabyte."""
        matrix_MM, self._matrix_MM = self._matrix_MM, torch.empty(0)
        for start in range(0, len(matrix_MM), _BLOCK):
            rows, after = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
            matrix_MM[after, rows] = matrix_MM[rows, after].T
            square = matrix_MM[rows, rows]
            square.copy_(square.triu() + square.triu(1).T)
        return matrix_MM if order_M is None else matrix_MM[order_M][:, order_M]


@contextmanager
def watch(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, Gram]]:
    """Collect the Gram matrices of these linears while the block runs. Those that are fed the same tensor share one."""
    grams: dict[str, Gram] = {}
    counted_by: dict[str, str] = {}  # who adds the inputs of this linear
    last: tuple[Any, str] = (None, "")

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            nonlocal last
            if name not in counted_by:
                counted_by[name] = last[1] if inputs[0] is last[0] else name
                grams[name] = grams.get(counted_by[name]) or Gram(inputs[0].shape[-1], inputs[0].device)
            if counted_by[name] == name:
                grams[name].add(inputs[0])
                last = inputs[0], name

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in linears.items()]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()


def root_of(gram_MM: torch.Tensor, damping: float, name: str = "a linear") -> torch.Tensor:
    """Upper triangular R with R R^T = the Gram matrix and `damping` of its mean diagonal on the diagonal.

    Where rounding has made the matrix indefinite, ten times the damping is tried, up to 1. Raises ModelError when the
    inputs hold a NaN or an infinity.
    """
    mean = gram_MM.diagonal().mean()
    if not torch.isfinite(mean):
        raise ModelError(f"{name}: its inputs on the calibration text are not finite; the model itself is broken there")
    if mean == 0:
        return torch.eye(gram_MM.shape[0], device=gram_MM.device)
    # Cholesky gives a lower factor; with rows and columns counted backwards it becomes the upper one.
    flipped, given = gram_MM.flip(0, 1), 0.0
    del gram_MM
    while damping <= 1:
        flipped.diagonal().add_((damping - given) * mean)
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not failed:
            del flipped
            return lower.flip(0, 1)
        damping, given = 10 * damping, damping
    raise ModelError(f"{name}: its inputs on the calibration text cannot be factored; use --method rtn")
