"""LoRA on some rows of a step: every sequence of a mixed batch gets the delta of its own adapter, nothing is merged.

How an adapter is read and refused is in adapters.py.

Shapes: T tokens of the step, I and O input and output width of a linear, R rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from pingjia.engine.sequence import Slice


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """delta(x) = x @ a_RI.T @ b_OR.T. `b_OR` already holds the scale (alpha / r, or alpha / sqrt(r) for rsLoRA)."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor


class AdapterRows:
    """Which rows of the step in progress belong to which adapter; one object, shared by all wrapped modules.

    `current`: rows among the tokens of the step. `outputs`: rows among its logits, which have an order of their own.

    A network hands its linears nothing but `x`, so this is the one thing here that is not passed as an argument.
    It is set for the length of one `run` only.
    """

    def __init__(self) -> None:
        self.current: dict[str, torch.Tensor | slice] = {}
        self.outputs: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def set(self, rows: list[Slice], outputs: list[Slice], device: torch.device) -> Iterator[None]:
        """`rows`: the slices in the order of their tokens; `outputs`: the same in the order of their logits."""
        num_rows = sum(piece.num_tokens for piece in rows)
        self.current = {
            key: slice(None) if len(index) == num_rows else torch.tensor(index, device=device)
            for key, index in _rows_of(rows).items()
        }
        keys = [piece.sequence.adapter for piece in outputs for _ in range(piece.num_outputs)]
        self.outputs = {
            key: torch.tensor([i for i, own in enumerate(keys) if own == key], device=device) for key in self.current
        }
        try:
            yield
        finally:
            self.current, self.outputs = {}, {}


def _rows_of(rows: list[Slice]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    start = 0
    for piece in rows:
        stop = start + piece.num_tokens
        if piece.sequence.adapter is not None:
            found.setdefault(piece.sequence.adapter, []).extend(range(start, stop))
        start = stop
    return found


class AdaptedLinear(torch.nn.Module):
    """Any linear, quantised or not, plus what the adapters add to it. `weights`: adapter key -> its two matrices."""

    def __init__(self, base: torch.nn.Module, adapter_rows: AdapterRows) -> None:
        super().__init__()
        self.base = base
        self.weights: dict[str, LoraWeights] = {}
        self._adapter_rows = adapter_rows

    def forward(self, x_1TI: torch.Tensor) -> torch.Tensor:
        y_1TO: torch.Tensor = self.base(x_1TI)
        for key, index in self._adapter_rows.current.items():
            lora = self.weights.get(key)
            if lora is not None:
                x = x_1TI[:, index].to(lora.a_RI.dtype)
                y_1TO[:, index] += (x @ lora.a_RI.T @ lora.b_OR.T).to(y_1TO.dtype)
        return y_1TO


def attach(model: torch.nn.Module, key: str, weights: Mapping[str, LoraWeights], adapter_rows: AdapterRows) -> None:
    """Put an adapter's matrices beside the linears they belong to, wrapping those that are not wrapped yet."""
    for path, lora in weights.items():
        module = model.get_submodule(path)
        if not isinstance(module, AdaptedLinear):
            module = AdaptedLinear(module, adapter_rows)
            replace_module(model, path, module)
        module.weights[key] = lora


def detach(model: torch.nn.Module, key: str) -> None:
    """Take an adapter away again; a linear that serves no adapter any more is unwrapped."""
    wrapped = [(path, m) for path, m in model.named_modules() if isinstance(m, AdaptedLinear)]
    for path, module in wrapped:
        module.weights.pop(key, None)
        if not module.weights:
            replace_module(model, path, module.base)


def replace_module(model: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
