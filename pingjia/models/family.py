"""What differs between families of models: positions, what a prompt token may see, names of their linears.

Told from the config's `model_type` and class, never from a directory's name. Everything else is the network's own file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Positions = Callable[[Any, Sequence[int], int, int], torch.Tensor]


def arange_positions(config: Any, ids: Sequence[int], start: int, stop: int) -> torch.Tensor:
    """int64 [stop - start]: 0, 1, 2, ... along the whole sequence."""
    return torch.arange(start, stop)


def no_prefix(config: Any, ids: Sequence[int]) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Family:
    """How one family of networks is fed and tuned.

    positions(config, ids, start, stop): positions of tokens start..stop-1 of the whole sequence `ids`, [n] or [2, n].
    prefix_len(config, ids): leading tokens that see each other both ways; 0 for causal families.
    lora_groups: group name -> endings of the module names in it.
    """

    name: str
    causal_prompt: bool
    lora_groups: Mapping[str, tuple[str, ...]]
    default_target: tuple[str, ...]
    positions: Positions = field(default=arange_positions)
    prefix_len: Callable[[Any, Sequence[int]], int] = field(default=no_prefix)


LLAMA_LIKE = Family(
    name="llama-like",
    causal_prompt=True,
    lora_groups={
        "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "ffn": ("gate_proj", "up_proj", "down_proj"),
        "embedding": ("embed_tokens",),
    },
    default_target=("q_proj", "v_proj"),
)
