"""PiSSA (arXiv:2404.02948): LoRA that begins with the principal part of a weight, and how it becomes a plain LoRA.

While it trains, the base holds what is left of each weight: W - scale * B0 A0. An adapter of B and A alone would be
added to the whole W by whoever loads it. So the finished adapter is what was learnt, B A - B0 A0, as one LoRA of twice
the rank.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict

from pingjia.errors import TrainingError

Tensors = Mapping[str, torch.Tensor]


def is_pissa(model: PeftModel) -> bool:
    return str(model.peft_config[str(model.active_adapter)].init_lora_weights).startswith("pissa")


def first_matrices(model: PeftModel) -> dict[str, torch.Tensor]:
    """A0 and B0 as they are before the first update; empty where the adapter is no PiSSA."""
    if not is_pissa(model):
        return {}
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items() if ".lora_" in name}


def require_plain_base(model: torch.nn.Module, init: str) -> None:
    """Refuse PiSSA on packed weights: it takes weights apart, and they are no numbers. TrainingError."""
    packed = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not _is_float(m)]
    if init.startswith("pissa") and packed:
        raise TrainingError(
            f"init_lora_weights {init} takes the base's weights apart, and {len(packed)} of them are packed "
            "(quantization_bit); use init_lora_weights=default with them"
        )


def _is_float(linear: torch.nn.Linear) -> bool:
    return isinstance(getattr(linear, "weight", None), torch.Tensor) and linear.weight.is_floating_point()


def as_lora(tensors: Tensors, first: Tensors, config: LoraConfig) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """What was learnt, as the tensors and the configuration of a LoRA on the untouched base.

    Twice the rank and twice alpha (square root of two times with rsLoRA), so that the scale stays.
    """
    learnt = dict(tensors)
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            learnt[name] = torch.cat([tensor, first[name].to(tensor.dtype)], dim=0).contiguous()
        elif ".lora_B." in name:
            learnt[name] = torch.cat([tensor, -first[name].to(tensor.dtype)], dim=1).contiguous()
    plain, factor = copy.deepcopy(config), 2**0.5 if config.use_rslora else 2
    plain.r, plain.lora_alpha, plain.init_lora_weights = 2 * config.r, factor * config.lora_alpha, True
    plain.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    plain.alpha_pattern = {name: factor * alpha for name, alpha in config.alpha_pattern.items()}
    return learnt, plain
