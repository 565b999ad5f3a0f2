"""The one place that chooses where tensors live and in which number format."""

from __future__ import annotations

import torch

from pingjia.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes an accelerator when torch reports one. A named device that is absent is a ModelError."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as e:
        raise ModelError(f"device {name!r} cannot be used here: {str(e).splitlines()[0]}; try device=cpu") from None
    return device


def pick_dtype(name: str | torch.dtype, device: torch.device, stored: torch.dtype | None = None) -> torch.dtype:
    """The dtype to compute in. `auto`: float32 on a CPU, else what the checkpoint was stored in.

    Half precision is a trap on a CPU: its backward measured about 200 times slower than float32.
    """
    if isinstance(name, torch.dtype):
        return name
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ModelError(f"dtype {name!r} is unknown; choose auto, {', '.join(DTYPES)}")
    return torch.float32 if device.type == "cpu" or stored is None else stored
