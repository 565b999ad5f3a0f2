"""Checks that turn a run which only looks fine into an error with its cause."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pingjia.errors import TrainingError
from pingjia.types import Encoded

MOVED_AFTER_STEPS = 5


class MovedCheck:
    """After MOVED_AFTER_STEPS updates every tensor that learns must differ from what it was at the start.

    Five, because LoRA's A has no gradient until B has left zero: it cannot move in the first update. Told by digests,
    not copies: where a whole network learns, copies would be as large as the network.
    """

    def __init__(self, model: torch.nn.Module, what: str = "adapter") -> None:
        self._before = {n: _digest(p) for n, p in model.named_parameters() if p.requires_grad}
        self._what = what
        if not self._before:
            raise TrainingError("no parameter is trainable: nothing would be learnt; check lora_target")

    def __call__(self, model: torch.nn.Module, last: LastUpdate | None = None) -> None:
        now = dict(model.named_parameters())
        stuck = [name for name, before in self._before.items() if _digest(now[name]) == before]
        if stuck:
            first = stuck[0]
            raise TrainingError(
                f"{len(stuck)} of {len(self._before)} {self._what} tensors have not moved after "
                f"{last.number if last else MOVED_AFTER_STEPS} updates (first: {first}); "
                f"{_why_stuck(first, now[first], last)}"
            )


@dataclass(frozen=True, slots=True)
class LastUpdate:
    """What is known of the update before a check. `rates`: of its parameter groups; `grad_norm`: before clipping.

    `gradients_seen`: False where gradients are elsewhere (DeepSpeed keeps them in pieces of its own).
    """

    number: int
    rates: tuple[float, ...]
    grad_norm: float
    max_grad_norm: float
    gradients_seen: bool


def _why_stuck(name: str, parameter: torch.nn.Parameter, last: LastUpdate | None) -> str:
    if last is not None and not any(last.rates):
        return "the learning rate of every update was 0: learning_rate 0, or a schedule that does not leave 0?"
    if last is not None and last.gradients_seen and parameter.grad is None:
        return "no gradient reaches it: the network does not use it, or something between it and the loss detaches"
    if last is not None and last.grad_norm > 1e3 * last.max_grad_norm:
        return (
            f"gradients of norm {last.grad_norm:.3g} are scaled down to max_grad_norm {last.max_grad_norm:.3g}, too "
            "little to change a float; raise max_grad_norm (1.0 is usual)"
        )
    if last is not None and parameter.grad is not None and not torch.count_nonzero(parameter.grad):
        return _why_zero(name, last)
    return "is learning_rate 0 or too small to change a float, or is the module not used by the network?"


def _why_zero(name: str, last: LastUpdate) -> str:
    if last.grad_norm == 0:
        return (
            "every gradient is exactly 0: what learns has no influence on the loss (an adapter that is switched off or "
            "scaled by 0?)"
        )
    return f"its gradient is exactly 0, that of others is not: what {name} computes has no influence on the loss"


def _digest(parameter: torch.Tensor) -> bytes:
    values = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(values.numpy().data, digest_size=16).digest()


def require_learnt(rows: Sequence[Encoded]) -> None:
    """Refuse rows of which no token is learnt, before anything is computed: their loss is 0 / 0."""
    idle = [row.where or f"row {number}" for number, row in enumerate(rows, start=1) if row.num_learnt == 0]
    if idle:
        raise TrainingError(
            f"{len(idle)} of {len(rows)} rows teach nothing (the first: {idle[0]}): every one of their tokens is "
            "masked, so there is no loss; does the chat template mark the answers, and are there any?"
        )


def require_graph(loss: torch.Tensor) -> None:
    """The loss must depend on something that learns. It does not where the way there is cut."""
    if not loss.requires_grad:
        raise TrainingError(
            "the loss depends on nothing that learns, so no gradient would reach anything: an adapter that is switched "
            "off, weights that were frozen after they were chosen, or layers computed again in the backward pass "
            "(gradient checkpointing with use_reentrant=True) whose input needs no gradient"
        )


def require_in_optimizer(model: torch.nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Every parameter that learns must be one that the optimizer moves, and only once."""
    held = [id(p) for group in groups for p in group["params"]]
    learning = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for key, name in learning.items() if key not in held]
    if missing or len(held) != len(set(held)):
        what = f"{len(missing)} are in none of its groups" if missing else "some are in two of its groups"
        first = f", the first: {missing[0]}" if missing else ""
        raise TrainingError(
            f"the optimizer does not hold the {len(learning)} tensors that learn: {what}{first}. They would get "
            "gradients and never move. This is a fault of the program: please report it with the recipe"
        )


def require_nonzero_adapter(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse an adapter whose every B matrix is zero: it equals the base model."""
    changed = [t for name, t in tensors.items() if "lora_B" in name or "lora_embedding_B" in name]
    if not any(torch.count_nonzero(t) for t in changed):
        raise TrainingError(
            f"all {len(changed)} lora_B matrices are zero: this adapter equals the base model; it is not saved"
        )
