"""The one place that chooses where tensors live and in which number format, and that asks a device about itself.

Everything that knows a kind of device by name (cuda, mps, npu) stands here; the rest of the package hands on a
`torch.device`. Nothing but a CPU has been measured by us.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from pingjia.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FUSED_OPTIMIZERS = {"cpu", "cuda", "mps"}  # where torch itself has a fused AdamW
_COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


def pick_device(name: str = "auto", *, index: int | None = None) -> torch.device:
    """`auto` takes an accelerator when torch reports one, or an Ascend NPU. `index`: which of several, where the name
    does not say. A named device that is absent is a ModelError.
    """
    if name == "auto":
        return _numbered(_accelerator() or torch.device("cpu"), index)
    if name.partition(":")[0] == "npu":
        _import_npu()
    try:
        device = _numbered(torch.device(name), index)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as e:
        raise ModelError(f"device {name!r} cannot be used here: {str(e).splitlines()[0]}; try device=cpu") from None
    return device


def _accelerator() -> torch.device | None:
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    if importlib.util.find_spec("torch_npu") is None:
        return None
    _import_npu()
    return torch.device("npu") if device_module("npu").is_available() else None


def _numbered(device: torch.device, index: int | None) -> torch.device:
    if index is None or device.index is not None or device.type in ("cpu", "mps"):
        return device
    return torch.device(device.type, index)


def _import_npu() -> None:
    """torch_npu adds the device by being imported."""
    try:
        import torch_npu  # noqa: F401
    except ImportError as e:
        raise ModelError(
            f"device=npu needs torch_npu ({str(e).splitlines()[0]}); install the release that fits torch "
            f"{torch.__version__.partition('+')[0]} and your CANN, or use device=cpu"
        ) from None


def device_module(kind: str) -> Any:
    """torch.cuda, torch.npu, torch.mps: what torch offers for a kind of accelerator."""
    module: ModuleType = torch.get_device_module(kind)
    return module


# ---- number formats


def pick_dtype(name: str | torch.dtype, device: torch.device, stored: torch.dtype | None = None) -> torch.dtype:
    """The dtype to compute in. `auto`: float32 on a CPU, else what the checkpoint was stored in, or float16 where that
    is bfloat16 and the device has none (Ascend 910A).

    Half precision is a trap on a CPU: its backward measured about 200 times slower than float32.
    """
    if isinstance(name, torch.dtype):
        return name
    if name != "auto" and name not in DTYPES:
        raise ModelError(f"dtype {name!r} is unknown; choose auto, {', '.join(DTYPES)}")
    if name == "auto":
        wanted = torch.float32 if device.type == "cpu" or stored is None else stored
        return torch.float16 if wanted == torch.bfloat16 and not has_bfloat16(device) else wanted
    if DTYPES[name] == torch.bfloat16 and not has_bfloat16(device):
        raise ModelError(f"dtype=bfloat16: {describe(device)} has no bfloat16; use dtype=float16 or float32")
    return DTYPES[name]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16. Ascend 910A and older NVIDIA cards do not; one not here might."""
    if device.type not in ("cuda", "npu"):
        return True
    module = device_module(device.type)
    return not module.is_available() or bool(module.is_bf16_supported())


def require_packed_weights(device: torch.device, bits: int) -> None:
    """Refuse INT4 or INT8 weights where they have never run."""
    if device.type == "npu":
        raise ModelError(
            f"quantization_bit={bits}: packed weights are unpacked by shifts of int8, which have not been run on "
            f"{describe(device)}; leave quantization_bit out there, or use device=cpu or cuda"
        )


def has_fused_optimizer(device: torch.device) -> bool:
    """Whether torch's AdamW has one kernel for all of an update there; Ascend's lives outside of torch."""
    return device.type in _FUSED_OPTIMIZERS


def describe(device: torch.device) -> str:
    """A name for a reader: `npu (Ascend910A)`, `cpu`."""
    if device.type in ("cuda", "npu"):
        return f"{device.type} ({device_module(device.type).get_device_name(device)})"
    return device.type


# ---- memory


def free_bytes(device: torch.device) -> int:
    """What a run on `device` can still take; more than there can be, where nobody knows."""
    if device.type in ("cpu", "mps"):  # which share their memory
        return int(psutil.virtual_memory().available)
    if device.type in ("cuda", "npu"):
        return int(device_module(device.type).mem_get_info(device)[0])
    return sys.maxsize  # the device says so itself when it is full


def limit_device_memory(device: torch.device, limit_bytes: float) -> None:
    """Let this process take no more than so much of an accelerator's memory. Nothing on a CPU."""
    if device.type in ("cuda", "npu"):
        module = device_module(device.type)
        total = module.get_device_properties(device).total_memory
        module.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)


# ---- several processes


def collective_backend(device: torch.device) -> str:
    """Name of torch.distributed's backend for tensors there."""
    if device.type not in _COLLECTIVES:
        raise ModelError(f"distributed: torch has no collectives for {device.type}; use {', '.join(_COLLECTIVES)}")
    return _COLLECTIVES[device.type]


# ---- random numbers


def rng_state() -> dict[str, Any]:
    """Where torch's generators stand: of the CPU, and of the accelerator where there is one."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type == "mps":
        state["mps"] = [device_module("mps").get_rng_state()]
    elif accelerator is not None:
        state[accelerator.type] = device_module(accelerator.type).get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators back. Those of a kind of accelerator that is not here now are passed over."""
    torch.set_rng_state(state["cpu"])
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or accelerator.type not in state:
        return
    if accelerator.type == "mps":
        device_module("mps").set_rng_state(state["mps"][0])
    else:
        device_module(accelerator.type).set_rng_state_all(state[accelerator.type])
