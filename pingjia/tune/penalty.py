"""L2 on the LoRA matrices: lambda times the sum of the squares of all A and B, as a term of the loss.

Not AdamW's weight decay, which shrinks weights outside the loss and is `weight_decay` in a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch


def lora_matrices(named: Iterable[tuple[str, torch.nn.Parameter]]) -> list[torch.nn.Parameter]:
    """Every trainable A and B, also of embeddings."""
    return [p for name, p in named if p.requires_grad and ".lora_" in name and "magnitude" not in name]


def l2_penalty(matrices: Iterable[torch.Tensor], strength: float) -> torch.Tensor:
    """strength * sum of squares over all matrices, a scalar with a gradient of 2 * strength * matrix."""
    squares = [matrix.float().square().sum() for matrix in matrices]
    return strength * torch.stack(squares).sum()


class Penalties:
    """Several terms of the loss at once: called, it gives their sum. `last`: what each of them came to then."""

    def __init__(self, terms: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        self._terms = dict(terms)
        self.last: dict[str, float] = {}

    def __call__(self) -> torch.Tensor:
        values = {name: term() for name, term in self._terms.items()}
        self.last = {name: value.detach().item() for name, value in values.items()}
        return torch.stack([*values.values()]).sum()
