"""Linears packed by bitsandbytes: NF4 and FP4 (QLoRA, arXiv:2305.14314), LLM.int8() (arXiv:2208.07339).

Its classes and kernels, put in place of a network's linears one at a time. On a CUDA device they are fast; on a CPU
they give the same numbers slowly, so that what runs on a card can be tried without one. Not here: our own formats
(`formats.py`), saving such a network, serving it. bitsandbytes is imported when a linear is packed, not before.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pingjia.errors import ModelError

OUTLIER_THRESHOLD = 6.0
"""Columns of the input beyond it are multiplied in floats by LLM.int8(), as its paper does."""


@dataclass(frozen=True, slots=True)
class BnbFormat:
    """How bitsandbytes packs. `kind` and `double` (the scales packed too, 0.4 bits a weight less) are for 4 bits."""

    bits: Literal[4, 8]
    kind: Literal["nf4", "fp4"] = "nf4"
    double: bool = True

    def __str__(self) -> str:
        if self.bits == 8:
            return "bitsandbytes LLM.int8()"
        return f"bitsandbytes {self.kind.upper()}{', double quantization' if self.double else ''}"


def is_installed() -> bool:
    """Whether bitsandbytes can be found; it is not imported."""
    return importlib.util.find_spec("bitsandbytes") is not None


def require_bitsandbytes() -> None:
    """ModelError with the command that installs it."""
    if not is_installed():
        raise ModelError(
            "quantization_method=bitsandbytes needs bitsandbytes; run: pip install 'pingjia[bnb]', or leave the key "
            "out: pingjia packs INT4 and INT8 itself"
        )


def is_packed_by_bnb(module: nn.Module) -> bool:
    """Whether a module's weight is packed by bitsandbytes. By its place of birth, so that nothing is imported."""
    return any(kind.__module__.startswith("bitsandbytes.") for kind in type(module).__mro__)


def pack_with_bnb(linear: nn.Linear, form: BnbFormat, device: torch.device) -> nn.Linear:
    """A packed linear on `device`, rounded from a float one. Its bias is shared, not copied, and may still be absent
    (on the meta device)."""
    packed = _four_bits(linear, form, device) if form.bits == 4 else _eight_bits(linear, device)
    packed.bias = linear.bias
    if packed.bias is not None:
        packed.bias.requires_grad_(False)
    return packed


def replace_linears(model: Any, names: list[str], form: BnbFormat, device: torch.device) -> None:
    """Pack these linears of a network in place, one at a time. PEFT then puts its adapters for such linears on them."""
    require_bitsandbytes()
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, pack_with_bnb(linear, form, device))
    setattr(model, f"is_loaded_in_{form.bits}bit", True)  # where PEFT looks


def _four_bits(linear: nn.Linear, form: BnbFormat, device: torch.device) -> Any:
    bnb = _bitsandbytes()
    weight = linear.weight.detach()
    packed = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=_compute_dtype(weight, device),
        compress_statistics=form.double,
        quant_type=form.kind,
        device="meta",
    )
    # bitsandbytes would turn the weights, in the first evaluation on such a CPU, into a bfloat16 layout that has no
    # backward pass, and train on with it.
    packed.support_avx512bf16_for_cpu = False
    packed.weight = bnb.nn.Params4bit(
        weight.contiguous(),
        requires_grad=False,
        compress_statistics=form.double,
        quant_type=form.kind,
        module=packed,
    ).to(device)
    return packed


def _eight_bits(linear: nn.Linear, device: torch.device) -> Any:
    bnb = _bitsandbytes()
    packed = bnb.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=OUTLIER_THRESHOLD,
        device="meta",
    )
    weight = linear.weight.detach().to("cpu")  # it packs what comes from the CPU
    packed.weight = bnb.nn.Int8Params(weight.contiguous(), requires_grad=False, has_fp16_weights=False).to(device)
    return packed


def _compute_dtype(weight: torch.Tensor, device: torch.device) -> torch.dtype:
    """Half precision is a trap on a CPU: its backward pass is about 200 times slower than float32's."""
    return torch.float32 if device.type == "cpu" else weight.dtype


def _bitsandbytes() -> Any:
    require_bitsandbytes()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes
