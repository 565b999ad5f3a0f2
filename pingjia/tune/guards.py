"""Checks that turn a run which only looks fine into an error with its cause."""

from __future__ import annotations

import torch

from pingjia.errors import TrainingError

MOVED_AFTER_STEPS = 5


class MovedCheck:
    """After MOVED_AFTER_STEPS updates every adapter tensor must differ from what it was at the start.

    Five, because LoRA's A has no gradient until B has left zero: it cannot move in the first update.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        if not self._before:
            raise TrainingError("no parameter is trainable: nothing would be learnt; check lora_target")

    def __call__(self, model: torch.nn.Module) -> None:
        now = dict(model.named_parameters())
        stuck = [name for name, before in self._before.items() if torch.equal(now[name].detach(), before)]
        if stuck:
            raise TrainingError(
                f"{len(stuck)} of {len(self._before)} adapter tensors have not moved after {MOVED_AFTER_STEPS} updates "
                f"(first: {stuck[0]}); is learning_rate 0, or is the module not used by the network?"
            )


def require_nonzero_adapter(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse an adapter whose every B matrix is zero: it equals the base model."""
    changed = [t for name, t in tensors.items() if "lora_B" in name or "lora_embedding_B" in name]
    if not any(torch.count_nonzero(t) for t in changed):
        raise TrainingError(
            f"all {len(changed)} lora_B matrices are zero: this adapter equals the base model; it is not saved"
        )
