"""The loss at the head, a few rows of logits at a time: a vocabulary's worth of floats per learnt token never exists.

A head is any module hidden -> logits. One that learns nothing gives its gradient with respect to the hidden states
already in the forward pass, so logits are computed once; one that learns (rows of new tokens) is computed again in the
backward pass.

Shapes: K learnt tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from pingjia.tune.swap import swapped_forward

MAX_LOGITS_BYTES = 64 * 2**20
"""Of float32 logits at once. A few hundred rows of an ordinary vocabulary: larger blocks measured no faster."""

_HALF_SCALE = 1024.0
"""What a gradient in fp16 is multiplied by while it goes through the head: at scale 1 small ones would become 0."""

Head = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def losses_for_logits(head: torch.nn.Module, target_K: torch.Tensor) -> Iterator[None]:
    """While open, `head(hidden [1, K, H])` returns the cross-entropy of each token, [1, K] in float32, not logits.

    Inside the network's own forward pass, so that whoever shards or moves its weights finds the head used where it
    always is.
    """
    logits_of: Head = head.forward
    with swapped_forward(head, lambda hidden_1KH: token_losses(hidden_1KH[0], target_K, logits_of).unsqueeze(0)):
        yield


def token_losses(hidden_KH: torch.Tensor, target_K: torch.Tensor, logits_of: Head) -> torch.Tensor:
    """-log softmax(logits)[target] of each token, float32 [K]. Equals `F.cross_entropy` to 1e-6, and its gradient."""
    probe = logits_of(hidden_KH[:0].detach())
    step = max(1, MAX_LOGITS_BYTES // (4 * probe.shape[-1]))
    if not torch.is_grad_enabled() or hidden_KH.shape[0] == 0:
        return _plain(hidden_KH, target_K, logits_of, step)
    if probe.requires_grad:
        return _recomputed(hidden_KH, target_K, logits_of, step)
    result: torch.Tensor = FrozenHeadLosses.apply(hidden_KH, target_K, logits_of, step)
    return result


def _plain(hidden_KH: torch.Tensor, target_K: torch.Tensor, logits_of: Head, step: int) -> torch.Tensor:
    pieces = zip(hidden_KH.split(step), target_K.split(step), strict=True)
    return torch.cat([_losses(hidden, target, logits_of) for hidden, target in pieces])


def _recomputed(hidden_KH: torch.Tensor, target_K: torch.Tensor, logits_of: Head, step: int) -> torch.Tensor:
    pieces = zip(hidden_KH.split(step), target_K.split(step), strict=True)
    return torch.cat([checkpoint(_losses, hidden, target, logits_of, use_reentrant=False) for hidden, target in pieces])


def _losses(hidden_KH: torch.Tensor, target_K: torch.Tensor, logits_of: Head) -> torch.Tensor:
    return F.cross_entropy(logits_of(hidden_KH).float(), target_K, reduction="none")


class FrozenHeadLosses(torch.autograd.Function):
    """The loss of each token under a head that does not learn; the gradient goes to the hidden states only.

    A token's loss depends on its own hidden state alone. So the gradient of each for a weight of 1 is kept (as large as
    the hidden states), and multiplied by whatever weight comes back.
    """

    @staticmethod
    def forward(ctx: Any, hidden_KH: torch.Tensor, target_K: torch.Tensor, logits_of: Head, step: int) -> torch.Tensor:
        losses_K = torch.empty(hidden_KH.shape[0], dtype=torch.float32, device=hidden_KH.device)
        grad_KH = torch.empty_like(hidden_KH, dtype=torch.float32)
        for start in range(0, hidden_KH.shape[0], step):
            rows = slice(start, start + step)
            losses_K[rows], grad_KH[rows] = _loss_and_gradient(hidden_KH[rows], target_K[rows], logits_of)
        ctx.save_for_backward(grad_KH)
        ctx.hidden_dtype = hidden_KH.dtype
        return losses_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_K: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad_KH,) = ctx.saved_tensors
        return (grad_KH * grad_K.unsqueeze(1)).to(ctx.hidden_dtype), None, None, None


def _loss_and_gradient(
    hidden_KH: torch.Tensor, target_K: torch.Tensor, logits_of: Head
) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses [K], gradient of each with respect to its hidden state [K, H]), in one buffer of logits."""
    hidden = hidden_KH.detach().requires_grad_()
    with torch.enable_grad():
        logits_KV = logits_of(hidden)
    # Taken now: what comes next overwrites the logits, and torch refuses to walk back from an overwritten view.
    edge = get_gradient_edge(logits_KV)
    losses_K, slope_KV = _softmax_in_place(logits_KV.detach().float(), target_K)
    scale = _HALF_SCALE if logits_KV.dtype == torch.float16 else 1.0
    slope_KV = slope_KV.to(logits_KV.dtype) if scale == 1.0 else slope_KV.mul_(scale).to(logits_KV.dtype)
    (grad_KH,) = torch.autograd.grad(edge, hidden, slope_KV)
    return losses_K, grad_KH.float() / scale


def _softmax_in_place(logits_KV: torch.Tensor, target_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, softmax - one at the target): the second is written over the logits, which a linear does not keep."""
    logits_KV -= logits_KV.amax(dim=1, keepdim=True)
    at_target_K = logits_KV.gather(1, target_K.unsqueeze(1)).squeeze(1)
    sums_K1 = logits_KV.exp_().sum(dim=1, keepdim=True)
    logits_KV /= sums_K1
    logits_KV[torch.arange(len(target_K), device=target_K.device), target_K] -= 1
    return sums_K1.squeeze(1).log() - at_target_K, logits_KV
