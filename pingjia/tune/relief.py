"""What the rungs of the ladder do to a network, and how a process learns that its memory is used up."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]
import torch

from pingjia.errors import TrainingError
from pingjia.models.device import free_bytes, has_bfloat16, limit_device_memory
from pingjia.quant.bnb import is_packed_by_bnb
from pingjia.quant.formats import FORMATS, PackedLinear
from pingjia.quant.half import HalfLinear
from pingjia.tune.buffers import BUFFERS
from pingjia.tune.frozen import Model, layers_of, network_of
from pingjia.tune.ladder import HALF, INT4, INT8, Rung, next_step, path, skipped_of
from pingjia.tune.launch import processes_here
from pingjia.tune.settings import TuneSettings

if TYPE_CHECKING:
    from pingjia.tune.distributed import Alone

OUT_OF_MEMORY = "out of memory"  # how the event begins that a step down the ladder leaves in the log
_M_MMAP_THRESHOLD = -3  # glibc's number for it
_LEFT_FREE = 0.05  # of what is free at the start, for what other programs take in the meantime


# ---- noticing


class MemoryLimitReached(torch.OutOfMemoryError):
    """The process holds more than it may."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left: on an accelerator, on the CPU, or by the limit below."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def resident_bytes() -> int:
    """What this process holds now. Looked up before every layer, so not by way of psutil where the kernel says it."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return int(psutil.Process().memory_info().rss)


class MemoryLimit:
    """Raises MemoryLimitReached when the process holds more than `limit_bytes`. For a CPU, where the system would kill
    the process instead of refusing it memory."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes

    def __call__(self) -> None:
        held = resident_bytes()
        if held > self.limit_bytes:
            raise MemoryLimitReached(
                f"the process holds {held / 1e9:.2f} GB of the {self.limit_bytes / 1e9:.2f} it may use"
            )


def limit_memory(
    model: Model, layers: Iterable[torch.nn.Module], limit_gb: float | None, ranks: Alone
) -> Callable[[], None]:
    """Hold each process to `limit_gb`, or on a CPU to its part of what is free. Returns what to call between
    micro-batches."""
    device = model.device
    if device.type == "cpu":
        free = int(free_bytes(device) * (1 - _LEFT_FREE)) // processes_here()
        return ranks.watch(
            layers, MemoryLimit(int(limit_gb * 1e9) if limit_gb is not None else resident_bytes() + free)
        )
    if limit_gb is not None:
        limit_device_memory(device, limit_gb * 1e9)
    return ranks.watch(layers, lambda: None) if ranks.is_cut else lambda: None


def release_memory(device: torch.device) -> None:
    """Give back what nobody holds any more; else what is free already would still be counted."""
    gc.collect()
    BUFFERS.clear()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other C libraries have none
        if trim is not None:
            trim(0)


def return_freed_memory() -> None:
    """Have glibc give back every freed block of a megabyte or more at once.

    By itself it soon keeps blocks of up to 32 MB for later, in pieces between those still in use: a step on SmolLM2
    then peaked 1.29 GB above the start instead of 0.82.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 2**20)


class Memory:
    """Which rung a run stands on, and how it gets to the next one."""

    def __init__(self, model: Model, rung: Rung, settings: TuneSettings, ranks: Alone) -> None:
        self._model, self.rung = model, rung
        return_freed_memory()
        self._refused = {**ranks.refused_rungs, **refusals(model)}
        self.check = limit_memory(model, layers_of(model), settings.memory_limit_gb, ranks)

    def go_to(self, rung: Rung) -> None:
        """Stand where a checkpoint says the run stood: by the same rungs, so that the weights come out the same."""
        for after in path(self.rung, rung, self._refused):
            self._stand_on(after)

    def step_down(self, rows_per_update: int, reason: str) -> str:
        """Use less memory; return what was done. TrainingError when there is nothing left to do."""
        step = next_step(self.rung, rows_per_update, self._refused)
        if step is None:
            skipped = "; ".join(skipped_of(self.rung, self._refused))
            raise TrainingError(
                f"out of memory ({reason}), and nothing is left to use less of it{f' ({skipped})' if skipped else ''}. "
                "Lower cutoff_len or lora_rank, raise memory_limit_gb, or take a smaller base"
            )
        release_memory(self._model.device)
        self._stand_on(step.rung)
        release_memory(self._model.device)
        return "; ".join((f"{OUT_OF_MEMORY} ({reason}): {step.change}", *step.skipped))

    def _stand_on(self, rung: Rung) -> None:
        apply_rung(self._model, self.rung, rung)
        self.rung = rung


# ---- using less


def refusals(model: Model) -> dict[str, str]:
    """Rungs that this network cannot stand on: HALF, INT8, INT4 -> why."""
    found: dict[str, str] = {}
    linears = base_linears(model)
    bits = min((m.bits for _, m in linears if isinstance(m, PackedLinear)), default=None)
    if bits is not None or network_of(model).dtype != torch.float32:
        stored = f"{bits} bits" if bits is not None else str(network_of(model).dtype).removeprefix("torch.")
        found[HALF] = f"the base is stored in {stored} already"
    elif not has_bfloat16(model.device):
        found[HALF] = "this device has no bfloat16; float16 needs its loss scaled from the start: dtype=float16"
    if bits is not None:
        found[INT8] = f"the base is stored in {bits} bits already"
    if bits == 4:
        found[INT4] = "the base is stored in 4 bits already"
    if any(is_packed_by_bnb(m) for _, m in linears):
        found[HALF] = found[INT8] = found[INT4] = "the base is packed by bitsandbytes already"
    if any(config.use_dora for config in getattr(model, "peft_config", {}).values()):
        found[INT8] = found[INT4] = "use_dora reads the weights as floats"
    if any(m.weight.requires_grad for _, m in linears):
        found[HALF] = found[INT8] = found[INT4] = "the base's own weights learn, and rounded they could not"
    odd = next((n for n, m in linears if m.in_features % 2), None)
    if odd is not None:
        found.setdefault(INT4, f"it packs columns in pairs, and {odd} has an odd number of them")
    return found


def apply_rung(model: Model, before: Rung, after: Rung) -> None:
    """Change the network to compute as `after` says. Adapters stay as they are, and so do their optimizer's states."""
    if after.checkpointing and not before.checkpointing:
        checkpoint_activations(model)
    if after.half and not before.half:
        store_half(model)
    if after.bits is not None and after.bits != before.bits:
        pack_base(model, after.bits)


def checkpoint_activations(model: Model) -> None:
    """Layers keep their input only and compute the rest again in the backward pass."""
    network_of(model).gradient_checkpointing_enable({"use_reentrant": False})


def base_linears(model: Model) -> list[tuple[str, torch.nn.Linear]]:
    """The linears of the base, under adapters or not; not the head."""
    base = network_of(model)
    head = base.get_output_embeddings()
    return [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and ".lora_" not in name
    ]


def store_half(model: Model) -> None:
    """Keep the base in bfloat16. On a CPU only its linears, widened to float32 for every product: arithmetic in half
    precision is up to 200 times slower there."""
    if model.device.type != "cpu":
        for name, parameter in model.named_parameters():
            is_adapter = ".lora_" in name or ".trainable_tokens_" in name
            if parameter.dtype == torch.float32 and not is_adapter:
                parameter.data = parameter.data.to(torch.bfloat16)
        return
    for name, linear in base_linears(model):
        half = HalfLinear(linear.in_features, linear.out_features, bias=False, device="meta")
        half.weight = torch.nn.Parameter(linear.weight.detach().to(torch.bfloat16), requires_grad=False)
        half.bias = linear.bias
        _replace(model, name, half)


def pack_base(model: Model, bits: int) -> None:
    """Round the base's linears to `bits`, from whatever they are stored in now."""
    for name, linear in base_linears(model):
        _replace(model, name, FORMATS[f"int{bits}"].of(_as_floats(linear)))
    network_of(model).config.quantization_bit = bits


def _as_floats(linear: torch.nn.Linear) -> torch.nn.Linear:
    if not isinstance(linear, PackedLinear):
        return linear
    floats = torch.nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    floats.weight = torch.nn.Parameter(linear.dequantize(), requires_grad=False)
    floats.bias = linear.bias
    return floats


def _replace(model: Model, name: str, module: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network_of(model).get_submodule(parent), child, module)
