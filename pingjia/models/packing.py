"""In which way a recipe's quantization_bit is obeyed: pingjia's own formats, or those of bitsandbytes."""

from __future__ import annotations

import torch

from pingjia.models.settings import ModelSettings
from pingjia.quant.bnb import BnbFormat, is_installed, is_packed_by_bnb, require_bitsandbytes
from pingjia.quant.formats import PackedLinear


def pick_packing(settings: ModelSettings, device: torch.device) -> int | BnbFormat | None:
    """What `load_model` takes as `bits`. ModelError when the recipe names bitsandbytes and it is not installed.

    `auto` is bitsandbytes on CUDA, where its kernels are, if it is installed; and on every other device our own.
    """
    bits = settings.quantization_bit
    if bits is None or settings.quantization_method == "pingjia":
        return bits
    if settings.quantization_method == "auto" and not (device.type == "cuda" and is_installed()):
        return bits
    require_bitsandbytes()
    return BnbFormat(bits, settings.quantization_type, settings.double_quantization)


def stored_bits(model: torch.nn.Module) -> str | None:
    """Who packed a network's linears and to how many bits, in a few words; None: floats."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            return f"{module.bits} bits"
        if is_packed_by_bnb(module) and isinstance(module, torch.nn.Linear):
            kind = getattr(module.weight, "quant_type", None)
            return f"4 bits by bitsandbytes ({kind})" if kind else "8 bits by bitsandbytes"
    return None
