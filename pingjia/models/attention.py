"""How any model runs over sequences of different lengths at once: laid end to end in one row, without padding.

`model(input_ids=[1, T], position_ids=..., packed=batch, use_cache=False)`. The registered attention function only
hands queries, keys and values to `batch.attend`; what a sequence may see, and where its older keys lie, is the batch's
affair.
Training uses `PackedSequences` below; the engine brings its own batch over pages.

Shapes: B batch (always 1 here), H query heads, K key/value heads, T tokens of all sequences, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

IMPLEMENTATION = "pingjia"


class PackedBatch(Protocol):
    """Sequences laid end to end, and what each of their tokens may look at."""

    def attend(
        self,
        layer_idx: int,
        q_BHTD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """Return o_BTHD."""
        ...


def packed_attention(
    module: torch.nn.Module,
    q_BHTD: torch.Tensor,
    k_BKTD: torch.Tensor,
    v_BKTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    packed: PackedBatch | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls for every layer when `config._attn_implementation == "pingjia"`."""
    assert packed is not None, "the 'pingjia' attention needs packed=...; use another attn_implementation for padding"
    assert attention_mask is None, "packed sequences carry their own mask"
    scaling = q_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    layer_idx: int = module.layer_idx  # type: ignore[assignment]  # every attention module of transformers has it
    return packed.attend(layer_idx, q_BHTD, k_BKTD, v_BKTD, scaling=scaling, dropout=dropout), None


AttentionInterface.register(IMPLEMENTATION, packed_attention)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch a model to packed rows. Its `generate` and padded batches no longer work until switched back."""
    model.set_attn_implementation(IMPLEMENTATION)


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """Whole sequences without a past, for training and scoring.

    `lengths` sum to T. `prefix_lens[i]` leading tokens of sequence i see each other both ways (0: causal all through).
    """

    lengths: tuple[int, ...]
    prefix_lens: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], prefix_lens: Sequence[int] | None = None) -> PackedSequences:
        prefix_lens = [0] * len(lengths) if prefix_lens is None else prefix_lens
        assert len(lengths) == len(prefix_lens)
        return cls(tuple(lengths), tuple(prefix_lens))

    def attend(
        self,
        layer_idx: int,
        q_BHTD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        outputs = []
        pieces = (tensor.split(self.lengths, dim=2) for tensor in (q_BHTD, k_BKTD, v_BKTD))
        for q, k, v, prefix_len in zip(*pieces, self.prefix_lens, strict=True):
            mask = prefix_mask(q.shape[2], prefix_len, q.device) if prefix_len > 1 else None
            outputs.append(sdpa(q, k, v, mask=mask, is_causal=mask is None, scaling=scaling, dropout=dropout))
        return torch.cat(outputs, dim=2).transpose(1, 2)


def prefix_mask(num_tokens: int, prefix_len: int, device: torch.device) -> torch.Tensor:
    """bool [T, T], True = may look: causal, and the first `prefix_len` columns are open to all rows."""
    mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril_()
    mask[:, :prefix_len] = True
    return mask


def sdpa(
    q_BHTD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """torch's attention with grouped key/value heads; returns [B, H, T, D]."""
    grouped = q_BHTD.shape[1] != k_BKSD.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTD,
        k_BKSD,
        v_BKSD,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=grouped,
    )
