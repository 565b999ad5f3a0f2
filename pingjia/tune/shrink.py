"""A LoRA of a lower rank that comes as near as possible to a given one, in place.

Per module the best approximation of scale * B A of rank r in the Frobenius norm (Eckart-Young) by SVD. Never forms the
full matrix: QR of both factors, then the SVD of a rank x rank core.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from pingjia.errors import TrainingError


def shrink_rank(model: PeftModel, rank: int) -> float:
    """Cut every module's adapter to `rank`; return the share of the adapters' squared norm that is lost (0 to 1).

    The larger factor of each product keeps its size. Configuration and scaling follow:
    alpha stays, and what alpha / rank changes is put into B.
    """
    name = model.active_adapter
    assert isinstance(name, str)
    lost = total = 0.0
    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.r:
            one_lost, one_total = _shrink(module, name, rank)
            lost, total = lost + one_lost, total + one_total
    config = model.peft_config[name]
    config.r = rank
    return lost / total if total else 0.0


def _shrink(module: LoraLayer, name: str, rank: int) -> tuple[float, float]:
    if module.r[name] <= rank:
        raise TrainingError(f"the adapter has rank {module.r[name]} already; it cannot shrink to {rank}")
    a_RI, b_OR = _factors(module, name)
    old_scale = module.scaling[name]
    new_scale = old_scale * (_divisor(module, name, module.r[name]) / _divisor(module, name, rank))
    new_a, new_b, lost, total = best_of_rank(a_RI.double(), b_OR.double() * (old_scale / new_scale), rank)
    _put(module, name, new_a.to(a_RI.dtype), new_b.to(b_OR.dtype))
    module.r[name], module.scaling[name] = rank, new_scale
    return lost * new_scale**2, total * new_scale**2


def best_of_rank(a_RI: torch.Tensor, b_OR: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """(A, B, lost, total): B A is the matrix of `rank` nearest to b_OR a_RI; the squared norms of what is lost and of
    all."""
    qb, rb = torch.linalg.qr(b_OR)
    qa, ra = torch.linalg.qr(a_RI.T)
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    # The larger factor keeps its size, the other one takes up the singular values. Shared out evenly, an adapter that
    # has not learnt yet (one factor is 0: B of a linear, A of an embedding) would come out 0 in both, and stay so.
    size_a, size_b = a_RI.norm(dim=1).mean(), b_OR.norm(dim=0).mean()
    sizes_a, sizes_b = (size_a, s[:rank] / size_a) if size_a >= size_b else (s[:rank] / size_b, size_b)
    new_a = (vt[:rank] @ qa.T) * sizes_a.reshape(-1, 1)
    new_b = (qb @ u[:, :rank]) * sizes_b
    return new_a, new_b, float(s[rank:].square().sum()), float(s.square().sum())


def _divisor(module: LoraLayer, name: str, rank: int) -> float:
    return rank**0.5 if module.use_rslora.get(name) else float(rank)


def _factors(module: LoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [rank, in], B [out, rank]) of a linear's or an embedding's adapter."""
    if name in module.lora_A:
        return module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
    return module.lora_embedding_A[name].detach(), module.lora_embedding_B[name].detach()


def _put(module: LoraLayer, name: str, a_RI: torch.Tensor, b_OR: torch.Tensor) -> None:
    if name not in module.lora_A:
        module.lora_embedding_A[name] = torch.nn.Parameter(a_RI.contiguous())
        module.lora_embedding_B[name] = torch.nn.Parameter(b_OR.contiguous())
        return
    for layers, weight in ((module.lora_A, a_RI), (module.lora_B, b_OR)):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight.contiguous())
        layers[name] = linear
