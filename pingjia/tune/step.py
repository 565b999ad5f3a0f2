"""The arithmetic of one update: rows -> tensors -> loss -> gradients -> new weights. Nothing about order or files.

Shapes: T tokens of all rows of a micro-batch end to end, K learnt tokens among them, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pingjia.errors import TrainingError
from pingjia.models.attention import PackedSequences
from pingjia.models.family import Family
from pingjia.tune.cross_entropy import losses_for_logits
from pingjia.tune.diagnose import find_cause, find_gradient
from pingjia.tune.distributed import ALONE, Alone
from pingjia.tune.frozen import Entering, passed_by
from pingjia.tune.guards import require_graph
from pingjia.tune.precision import Precision
from pingjia.tune.products import fast_products
from pingjia.types import Encoded


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows laid end to end. `keep_K` are the positions whose next token is learnt, `target_K` those tokens.

    `weight_K`: the weights of their rows; None when all are 1. `entering`: what the rows are above the layers that do
    not learn, where those have been passed already. `is_idle`: another process has one batch more; this one keeps it
    company, and teaches nothing.
    """

    input_ids_1T: torch.Tensor
    position_ids: torch.Tensor  # [1, T], or [1, 2, T] for two-dimensional positions
    packed: PackedSequences
    keep_K: torch.Tensor
    target_K: torch.Tensor
    weight_K: torch.Tensor | None = None
    entering: Entering | None = None
    is_idle: bool = False

    @property
    def num_tokens(self) -> int:
        return 0 if self.is_idle else self.input_ids_1T.shape[1]

    @property
    def num_learnt(self) -> int:
        return 0 if self.is_idle else self.target_K.shape[0]


Penalty = Callable[[], torch.Tensor]
"""A term of the loss that does not depend on the rows; a scalar with a gradient."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """`loss` is that of the rows, nats per learnt token; `l2` the penalty that was added to it.

    `event`: what happened on the way, for the log.
    """

    loss: float
    l2: float
    grad_norm: float
    num_tokens: int
    num_learnt: int
    seconds: float
    event: str | None = None


def build_batch(rows: Sequence[Encoded], family: Family, config: object, device: torch.device) -> MicroBatch:
    """Lay rows end to end; no padding, and no row sees another."""
    ids: list[int] = []
    keep: list[int] = []
    target: list[int] = []
    weight: list[float] = []
    positions, prefix_lens = [], []
    for row in rows:
        start = len(ids)
        positions.append(family.positions(config, row.ids, 0, len(row.ids)))
        prefix_lens.append(family.prefix_len(config, row.ids))
        learnt = [i for i in range(1, len(row.ids)) if row.learn[i]]
        keep.extend(start + i - 1 for i in learnt)
        target.extend(row.ids[i] for i in learnt)
        weight.extend([row.weight] * len(learnt))
        ids.extend(row.ids)
    return MicroBatch(
        input_ids_1T=torch.tensor([ids], device=device),
        position_ids=torch.cat(positions, dim=-1).unsqueeze(0).to(device),
        packed=PackedSequences.of([len(row.ids) for row in rows], prefix_lens),
        keep_K=torch.tensor(keep, device=device),
        target_K=torch.tensor(target, device=device),
        weight_K=None if all(w == 1 for w in weight) else torch.tensor(weight, device=device),
    )


def summed_loss(model: Any, batch: MicroBatch, *, weighted: bool = True) -> torch.Tensor:
    """Sum of the cross-entropy (nats) over the learnt tokens; logits exist only where something is learnt, and only a
    few at once.

    With `weighted`, a token counts as much as the weight of its row says.
    """
    head = model.get_output_embeddings()
    entering = batch.entering
    with losses_for_logits(head, batch.target_K), passed_by(entering.below if entering else ()):
        losses_1K = model(
            input_ids=None if entering else batch.input_ids_1T,
            inputs_embeds=entering.states_1TH if entering else None,
            position_ids=batch.position_ids,
            packed=batch.packed,
            logits_to_keep=batch.keep_K,
            use_cache=False,
        ).logits
    if batch.is_idle:
        return losses_1K.sum() * 0.0
    if batch.weight_K is None or not weighted:
        return losses_1K.sum()
    return losses_1K[0] @ batch.weight_K


@fast_products()
def update(
    ranks: Alone,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    *,
    rate_factor: float,
    max_grad_norm: float,
    penalty: Penalty | None = None,
    before_each: Callable[[], None] | None = None,
) -> StepResult:
    """One optimizer update over the micro-batches of all processes; the loss is the mean over ALL their learnt tokens.

    Every parameter group learns at `rate_factor` times its peak rate. `penalty()` is added to the loss once.
    `before_each()` is called before every micro-batch and may refuse to go on.

    (Averaging per-micro-batch means instead would weigh a short answer's tokens more than a long one's.) Row weights
    multiply the loss but not the number of tokens it is divided by: a row of weight 2 pulls twice as hard, also alone.
    Gradients that overflow float16 are computed again from a smaller loss (`precision.py`); `event` says so. Raises
    TrainingError when loss or gradient is not a finite number; the weights are then untouched.
    """
    started = time.perf_counter()
    tokens, learnt = ranks.total(sum(b.num_tokens for b in batches), sum(b.num_learnt for b in batches))
    num_tokens, num_learnt = int(tokens), int(learnt)
    first_scale = ranks.precision.scale
    while True:
        total, l2 = ranks.attempt(
            partial(_gradients, ranks, model, optimizer, batches, num_learnt, penalty, before_each)
        )
        norm = ranks.clip_grad_norm_(optimizer, max_grad_norm)
        (total,) = ranks.total(total)
        if math.isfinite(total) and math.isfinite(norm):
            break
        if not math.isfinite(total) or not ranks.precision.skip():
            raise _diverged(ranks, model, batches if ranks.size == 1 else [], total / num_learnt, norm)
    for group in optimizer.param_groups:
        group["lr"] = rate_factor * group["peak"]
    event = _overflow_event(ranks.precision, first_scale)
    ranks.step(optimizer)
    seconds = time.perf_counter() - started
    return StepResult(total / num_learnt, l2, norm, num_tokens, num_learnt, seconds, event)


def _gradients(
    ranks: Alone,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    num_learnt: int,
    penalty: Penalty | None,
    before_each: Callable[[], None] | None,
) -> tuple[float, float]:
    """Leave the gradient of this process's micro-batches; return (sum of their loss, penalty)."""
    total = l2 = 0.0
    optimizer.zero_grad()
    for number, batch in enumerate(batches):
        if before_each is not None:
            before_each()
        loss = _loss_in_format(ranks, model, batch)
        require_graph(loss)
        total += loss.detach().item()
        loss = loss / num_learnt
        if penalty is not None and number == 0:
            extra = penalty()
            l2 = extra.detach().item()
            loss = loss + extra / ranks.size
        ranks.backward(loss)
    return total, l2


def _loss_in_format(ranks: Alone, model: torch.nn.Module, batch: MicroBatch, *, weighted: bool = True) -> torch.Tensor:
    with ranks.precision.autocast():
        return summed_loss(model, batch, weighted=weighted)


def _overflow_event(precision: Precision, first_scale: float | None) -> str | None:
    if precision.scale == first_scale:
        return None
    return (
        f"gradients overflowed float16: loss scale {first_scale:.0f} -> {precision.scale:.0f}, same rows again "
        f"({precision.num_skipped} attempts skipped so far)"
    )


@fast_products()
def rehearse_update(ranks: Alone, model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: MicroBatch) -> None:
    """Use the memory that an update on `batch` uses, and change nothing: weights, optimizer and gradients stay.

    Random numbers are drawn.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [torch.full_like(p, 0.0) for p in parameters for _ in range(2)] if not optimizer.state else []
    try:
        loss = _loss_in_format(ranks, model, batch)
        require_graph(loss)
        ranks.backward(loss / batch.num_learnt)
    finally:
        del moments
        optimizer.zero_grad()


def _diverged(
    ranks: Alone, model: torch.nn.Module, batches: Sequence[MicroBatch], loss: float, grad_norm: float
) -> TrainingError:
    """What to say of a loss or gradient that is no number: what it is, where it begins, what to do."""
    cause = find_cause(model, [partial(_loss_in_format, ranks, model, batch) for batch in batches])
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    why = str(cause) if cause else find_gradient(named, ranks.precision.scale)
    name, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
    return TrainingError(f"{name} is {value}: training has diverged: {why}; the last checkpoint is still good")


@torch.no_grad()
@fast_products()
def mean_loss(model: torch.nn.Module, batches: Sequence[MicroBatch], ranks: Alone = ALONE) -> float:
    """Mean cross-entropy (nats per learnt token) without dropout and row weights; the training mode is put back."""
    was_training = model.training
    model.eval()
    try:
        total = sum(_loss_in_format(ranks, model, batch, weighted=False).item() for batch in batches)
    finally:
        model.train(was_training)
    total, learnt = ranks.total(total, sum(batch.num_learnt for batch in batches))
    return total / learnt
