"""New ranks beside frozen old ones inside a network: PEFT applies both adapters, and only the new one learns.

Orthogonality between them is O-LoRA's (arXiv:2310.14152). What the two come to as one adapter is in elastic.py.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from pingjia.errors import TrainingError
from pingjia.tune.elastic import Loras, Tensors, joined, loras

NEW = "default"
OLD = "earlier"


def grow_beside(model: PeftModel, tensors: Tensors, config: LoraConfig) -> None:
    """Put an earlier adapter, frozen and without dropout, beside the new one, whose A is turned away from it.

    The network then computes what the earlier adapter made of it, to the last bit: the new B is 0.
    """
    earlier = copy.deepcopy(config)
    earlier.lora_dropout, earlier.init_lora_weights, earlier.inference_mode = 0.0, True, True
    model.add_adapter(OLD, earlier)
    result = set_peft_model_state_dict(model, dict(tensors), adapter_name=OLD)
    if result.unexpected_keys:
        raise TrainingError(
            f"the earlier adapter has no place in this network, for example {result.unexpected_keys[0]}"
        )
    model.base_model.set_adapter([NEW, OLD])
    for name, parameter in model.named_parameters():
        if f".{OLD}" in name:
            parameter.requires_grad_(False)
    _turn_away(model)


def orthogonality(model: PeftModel, strength: float) -> torch.Tensor:
    """strength * sum over modules of ||A_old A_new^T||^2: a scalar, its gradient is 2 strength A_new A_old^T A_old."""
    overlaps = [(old @ new.T).float().square().sum() for old, new in _pairs(model)]
    return strength * torch.stack(overlaps).sum()


def has_pairs(model: PeftModel) -> bool:
    """Whether any module has old and new ranks."""
    return any(True for _ in _pairs(model))


def old_digest(model: PeftModel) -> str:
    """blake2b over every byte of the frozen ranks."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(_tensors(model, OLD).items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def grown(model: PeftModel) -> Loras:
    """Old and new ranks as one adapter."""
    return joined(*(loras(_tensors(model, name), model.peft_config[name]) for name in (OLD, NEW)))


def _tensors(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return tensors


def _pairs(model: PeftModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(A_old, A_new) of every linear that has both. An embedding's A begins at 0 and picks rows; it is left alone."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and OLD in module.lora_A and NEW in module.lora_A:
            yield module.lora_A[OLD].weight, module.lora_A[NEW].weight


@torch.no_grad()
def _turn_away(model: PeftModel) -> None:
    """Take out of each new A what lies in the rows of the old one, so that they are at right angles from the start."""
    for old, new in _pairs(model):
        if old.shape[0] < old.shape[1]:
            basis, _ = torch.linalg.qr(old.double().T)
            wide = new.double()
            new.copy_((wide - wide @ basis @ basis.T).to(new.dtype))
