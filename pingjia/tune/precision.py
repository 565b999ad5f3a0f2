"""Half precision while training: weights that learn stay in float32, products run in float16 or bfloat16 (`autocast`).

float16 has too few exponents for small gradients, so the loss is multiplied by a scale first, and gradients are divided
by it again (torch.amp.GradScaler). Where they overflow, the update is not made: the same rows are tried again at half
the scale, so that none is lost. Not here: the number format a base is stored in (`models/device.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pingjia.errors import TrainingError
from pingjia.models.device import describe, has_bfloat16
from pingjia.tune.settings import TuneSettings

FIRST_SCALE = 2.0**16
LEAST_SCALE = 1.0
GROWTH_INTERVAL = 2000
"""Updates in a row without an overflow after which the scale is doubled; as torch's own default."""


class Precision:
    """Everything in the dtype it is stored in; also what the formats below have in common.

    `num_skipped`: attempts that came to nothing because of an overflow, since the optimizer was built.
    """

    dtype: torch.dtype | None = None
    num_skipped = 0

    def autocast(self) -> AbstractContextManager[Any]:
        """While open, products are computed in the format."""
        return nullcontext()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Begin with this optimizer; what there is to remember is kept in its state, and so in every checkpoint."""

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to go backward from."""
        return loss

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Make gradients those of the loss itself. Once an attempt, when they are summed over the processes."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the update, whose gradients are all numbers."""
        optimizer.step()

    def stepped(self) -> None:
        """Another one has unscaled the gradients and made the update (DeepSpeed)."""

    def with_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of an optimizer, and what the precision has to remember."""
        return state

    def take_state(self, state: Mapping[str, Any]) -> None:
        """Be as when `with_state` was called."""

    def skip(self) -> bool:
        """The attempt overflowed. False when there is nothing left to try."""
        return False

    @property
    def scale(self) -> float | None:
        """What the loss is multiplied by; None where it never is."""
        return None


PLAIN = Precision()


class Bfloat16(Precision):
    """As many exponents as float32: nothing has to be scaled."""

    dtype = torch.bfloat16

    def __init__(self, device: torch.device) -> None:
        self._kind = device.type

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._kind, dtype=self.dtype)


class Float16(Precision):
    """Scaled losses."""

    dtype = torch.float16

    def __init__(self, device: torch.device, first_scale: float = FIRST_SCALE) -> None:
        self._kind, self._first_scale = device.type, first_scale
        self._scaler = self._new_scaler(first_scale)

    def _new_scaler(self, scale: float) -> Any:
        return torch.amp.GradScaler(self._kind, init_scale=scale, growth_interval=GROWTH_INTERVAL)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._kind, dtype=self.dtype)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        require_float32(p for group in optimizer.param_groups for p in group["params"])
        self._scaler, self.num_skipped = self._new_scaler(self._first_scale), 0
        optimizer.register_state_dict_post_hook(lambda _, state: self.with_state(state))
        optimizer.register_load_state_dict_pre_hook(lambda _, state: self.take_state(state))

    def with_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "loss_scale": {**self._scaler.state_dict(), "num_skipped": self.num_skipped}}

    def take_state(self, state: Mapping[str, Any]) -> None:
        saved = dict(state["loss_scale"])
        self.num_skipped = saved.pop("num_skipped")
        self._scaler = self._new_scaler(self._first_scale)
        self._scaler.load_state_dict(saved)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._scaler.scale(loss)
        return product

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self._scaler.step(optimizer)
        self._scaler.update()

    def stepped(self) -> None:
        scale, in_a_row = self._scaler.get_scale(), self._scaler.state_dict()["_growth_tracker"] + 1
        self._set(2 * scale, 0) if in_a_row >= GROWTH_INTERVAL else self._set(scale, in_a_row)

    def skip(self) -> bool:
        scale = self._scaler.get_scale()
        if scale <= LEAST_SCALE:
            return False
        self._set(max(LEAST_SCALE, scale / 2), 0)
        self.num_skipped += 1
        return True

    def _set(self, scale: float, in_a_row: int) -> None:
        changed = {**self._scaler.state_dict(), "scale": scale, "_growth_tracker": in_a_row}
        self._scaler = self._new_scaler(self._first_scale)  # anew: the old one may hold gradients of an attempt
        self._scaler.load_state_dict(changed)

    @property
    def scale(self) -> float | None:
        return float(self._scaler.get_scale())


def require_float32(parameters: Any) -> None:
    """Refuse weights that learn in float16: an update smaller than 1/2000 of a weight is rounded away."""
    half: Sequence[torch.Tensor] = [p for p in parameters if p.dtype == torch.float16]
    if half:
        raise TrainingError(
            f"fp16=true, and {len(half)} tensors that learn are stored in float16 themselves, where a small update is "
            "rounded away; load them with dtype=float32 (what is computed is float16 all the same), or use bf16=true"
        )


def pick_precision(settings: TuneSettings, device: torch.device) -> Precision:
    """What the recipe says. On an accelerator without bfloat16 (Ascend 910A, older NVIDIA cards) float16 with a scaled
    loss, also where the recipe says nothing: what is stored in bfloat16 is computed in float16 there.

    TrainingError for bf16 on such a device.
    """
    if settings.bf16:
        if not has_bfloat16(device):
            raise TrainingError(f"bf16=true: {describe(device)} has no bfloat16; use fp16=true")
        return Bfloat16(device)
    if settings.fp16 or (device.type != "cpu" and not has_bfloat16(device)):
        return Float16(device)
    return PLAIN


def base_dtype(dtype: str, settings: TuneSettings, device: torch.device) -> str:
    """The `dtype` to load the base in, where the recipe says `auto`: float32 if the weights themselves learn; under an
    adapter the half format that is computed in (not on a CPU), or else still `auto`.

    TrainingError where the recipe names the other half format.
    """
    half = "float16" if settings.fp16 else "bfloat16" if settings.bf16 else None
    if half is not None and dtype not in ("auto", "float32", half):
        raise TrainingError(
            f"{'fp16' if settings.fp16 else 'bf16'}=true computes in {half}, and dtype={dtype} stores the base in the "
            "other half format; leave dtype out"
        )
    if dtype != "auto":
        return dtype
    if settings.finetuning_type != "lora":
        return "float32"
    return half if half is not None and device.type != "cpu" else "auto"
