"""Where a number that is none came from: which module, and whether its weights, its input or the number format.

Runs the forward pass again, without gradients, once something has gone wrong; a sound run pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pingjia.tune.fused import unfused
from pingjia.tune.groups import module_of


@dataclass(frozen=True, slots=True)
class Cause:
    """The first module that gave a number that is none. `bad_weights`: how many of its own are none; `largest_input`:
    None when the input held such numbers already."""

    module: str
    bad_weights: int
    largest_input: float | None
    dtype: torch.dtype

    def __str__(self) -> str:
        where = f"it begins in {self.module}"
        if self.bad_weights:
            return (
                f"{where}: {self.bad_weights} of its weights are no numbers. If they are the base model's, its file is "
                "damaged: fetch it again; if the adapter's, start from an earlier checkpoint"
            )
        if self.largest_input is None:
            return f"{where}, whose input already is none: what is computed before it overflowed in {_name(self.dtype)}"
        limit = torch.finfo(self.dtype).max
        return (
            f"{where}: weights and input are sound (largest input {self.largest_input:.3g}), the result is beyond "
            f"{limit:.3g}, the largest {_name(self.dtype)}. {_advice(self.dtype)}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _advice(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return "Use bf16=true (or dtype=bfloat16), or float32 where the device has no bfloat16"
    return "Lower learning_rate (try a tenth)"


def find_cause(model: torch.nn.Module, forward_passes: Sequence[Callable[[], object]]) -> Cause | None:
    """The first module whose output holds a number that is none. None when the forward passes are sound."""
    found: list[Cause] = []
    with torch.no_grad(), unfused(model), _watched(model, found):
        for forward in forward_passes:
            forward()
            if found:
                return found[0]
    return None


def find_gradient(named: Sequence[tuple[str, torch.nn.Parameter]], loss_scale: float | None = None) -> str:
    """What is known when only gradients hold numbers that are none. `loss_scale`: of float16, at its least."""
    bad = [name for name, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]
    if not bad:
        return "every gradient is a number and their norm is none: it is too large. Lower learning_rate (try a tenth)"
    advice = _advice(torch.float32)
    if loss_scale is not None:
        advice = (
            f"They overflow float16 although the loss is scaled by {loss_scale:.0f} only: use bf16=true, or float32 "
            "(leave fp16 out) where the device has no bfloat16; or lower learning_rate (try a tenth)"
        )
    elif torch.float16 in {p.dtype for _, p in named}:
        advice = "The loss was scaled too high for float16: use dtype=bfloat16"
    return (
        f"the forward pass is sound, and {len(bad)} of {len(named)} gradients are not, the last of them in the order "
        f"of the network that of {module_of(bad[-1])}. {advice}"
    )


@contextmanager
def _watched(model: torch.nn.Module, found: list[Cause]) -> Iterator[None]:
    def look(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not found and _is_bad(output):
                found.append(_cause(name, module, args, output))

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cause(name: str, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Cause:
    inputs = [t for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()]
    largest = None if any(map(_is_bad, inputs)) else max((float(t.abs().max()) for t in inputs), default=0.0)
    own = [*module.parameters(), *module.buffers()]
    bad_weights = sum(int((~torch.isfinite(t)).sum()) for t in own if t.is_floating_point())
    return Cause(_plain_name(name), bad_weights, largest, output.dtype)


def _plain_name(name: str) -> str:
    """As in the base network, where the part of an adapter is named after what it is part of."""
    base = name.removeprefix("base_model.model.").removesuffix(".base_layer")
    head, mark, part = base.partition(".lora_")
    return f"{head} (adapter, {part[0]})" if mark else base


def _is_bad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())
