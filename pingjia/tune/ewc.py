"""Elastic weight consolidation (arXiv:1612.00796): what earlier tasks need is held where it is, by a spring per number.

The springs are the diagonal of the Fisher information, from the gradients of the earlier task's own rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model_state_dict

from pingjia.errors import TrainingError
from pingjia.models.family import Family
from pingjia.tune.checkpoint import write_bytes
from pingjia.tune.step import build_batch, summed_loss
from pingjia.types import Encoded

FISHER_FILE = "fisher.safetensors"
Tensors = Mapping[str, torch.Tensor]


def fisher(model: PeftModel, family: Family, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Diagonal (empirical) Fisher information of the adapter, by the names of its file, per learnt token.

    Sum over rows of the squared gradient of the row's summed loss, divided by all their learnt tokens: so a lambda of 1
    weighs the earlier rows like as many new ones. Without dropout; gradients and training mode are put back.
    """
    parameters = adapter_parameters(model)
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    was_training = model.training
    model.eval()
    for row in rows:
        loss = summed_loss(model, build_batch([row], family, model.config, model.device), weighted=False)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient.float().square()
    model.train(was_training)
    num_tokens = sum(row.num_learnt for row in rows)
    return {name: (value / num_tokens).cpu() for name, value in total.items()}


def ewc_penalty(
    parameters: Mapping[str, torch.nn.Parameter], springs: Tensors, rest: Tensors, strength: float
) -> torch.Tensor:
    """strength / 2 * sum of F (theta - rest)^2: a scalar, its gradient is strength F (theta - rest)."""
    terms = [(springs[name] * (p.float() - rest[name]).square()).sum() for name, p in parameters.items()]
    return 0.5 * strength * torch.stack(terms).sum()


def adapter_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The live parameters of the adapter, by their names in its file."""
    live = {p.data_ptr(): p for p in model.parameters()}
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: live[tensor.data_ptr()] for name, tensor in sorted(saved.items())}


def spread(rows: Sequence[Encoded], limit: int) -> list[Encoded]:
    """At most `limit` rows, evenly over all of them."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def write_fisher(folder: Path, values: Tensors, key: str = "") -> None:
    """`key`: what they belong to, for `read_fisher`."""
    write_bytes(folder / FISHER_FILE, safetensors.torch.save(dict(values), metadata={"key": key}))


def read_fisher(folder: Path, key: str | None = None) -> dict[str, torch.Tensor] | None:
    """The Fisher information in a directory; None when there is none, or (where `key` is given) of something else."""
    file = folder / FISHER_FILE
    if not file.exists():
        return None
    try:
        with safetensors.safe_open(file, "pt") as opened:
            if key is not None and (opened.metadata() or {}).get("key") != key:
                return None
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
    except (OSError, safetensors.SafetensorError) as e:
        raise TrainingError(f"{file}: damaged ({e}); delete it, and it is computed from earlier rows") from None
