"""Attention written out, for networks of this package: what runs when attention weights are asked for.

Shapes: B batch, H heads, T queries, S keys, D head size, G key/value groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def eager_attention(
    module: nn.Module,
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (o_BTHD, weights_BHTS). The mask is added to the scores; softmax in float32."""
    assert isinstance(module.num_key_value_groups, int)
    k_BHSD = k_BGSD.repeat_interleave(module.num_key_value_groups, dim=1)
    v_BHSD = v_BGSD.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = q_BHTD @ k_BHSD.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q_BHTD.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ v_BHSD).transpose(1, 2), weights
