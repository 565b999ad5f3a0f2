"""DeepSpeed's ZeRO stage 3 as one of the ways in which processes share a run; see distributed.py.

zero3.json is what DeepSpeed is told; the recipe's numbers go where it says "auto".
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pingjia.errors import TrainingError
from pingjia.tune.distributed import Together, require_shareable
from pingjia.tune.precision import Precision
from pingjia.tune.settings import TuneSettings


def deepspeed_config(settings: TuneSettings) -> dict[str, Any]:
    """The JSON for ZeRO-3 with the recipe's numbers put where it says "auto"."""
    file = settings.distributed.deepspeed_config
    path = Path(file) if file else Path(__file__).with_name("zero3.json")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise TrainingError(f"distributed.deepspeed_config {path}: cannot be read: {e}") from None
    stage = config.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise TrainingError(f"{path}: zero_optimization.stage is {stage}; strategy=zero3 needs 3")
    known = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": settings.max_grad_norm}
    for key, value in known.items():
        if config.get(key, "auto") not in ("auto", value):
            raise TrainingError(f'{path}: {key} is {config[key]}, the recipe says {value}; write "auto" there')
        config[key] = value
    return config


class Zero3(Together):
    """DeepSpeed's ZeRO stage 3, built by accelerate: weights, gradients and optimizer are all shared out."""

    is_cut = True
    has_ladder = False

    def __init__(self, device: torch.device, precision: Precision, config: Mapping[str, Any]) -> None:
        super().__init__(device, precision)
        self._config = dict(config)
        self._engine: Any = None

    def prepare(self, model: Any) -> Any:
        require_shareable(model)
        # DeepSpeed switches autocast off around its engine, so it is switched on inside.
        model.forward = partial(_computed_in, self.precision, model.forward)
        return _Engine(model)  # DeepSpeed takes network and optimizer together: see below

    def optimizer(self, model: Any, groups: list[dict[str, Any]], weight_decay: float) -> Any:
        accelerator = _deepspeed_accelerator(self.device, self._config)
        plain = super().optimizer(model, groups, weight_decay)
        plain_groups = plain.state_dict()["param_groups"]
        self._learning = [p for group in groups for p in group["params"]]  # now: DeepSpeed empties the groups
        self._engine, _ = accelerator.prepare(model.network, plain)
        model.engine = self._engine
        return _EngineOptimizer(self._engine, plain_groups, self._learning, self.precision)

    def backward(self, loss: torch.Tensor) -> None:
        """DeepSpeed takes the mean over the processes, we the sum. It multiplies by the loss scale, and divides again
        when it steps."""
        if self.precision.scale is not None:
            self._engine.optimizer.override_loss_scale(self.precision.scale)
        self._engine.backward(loss * self.size)

    def clip_grad_norm_(self, optimizer: Any, max_norm: float) -> float:
        """The norm only: DeepSpeed scales the gradients down itself, by `gradient_clipping`, when it steps."""
        from deepspeed.utils import safe_get_local_grad

        squares = sum(float(safe_get_local_grad(p).double().square().sum()) for p in self._learning)
        return float(self.total(squares)[0] ** 0.5) / (self.precision.scale or 1.0)

    def step(self, optimizer: Any) -> None:
        optimizer.step()
        self.precision.stepped()

    @contextmanager
    def whole(self, model: torch.nn.Module) -> Iterator[None]:
        import deepspeed

        learning = [p for p in model.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(learning, modifier_rank=0):
            yield

    def _count(self, model: torch.nn.Module) -> tuple[int, int]:
        parameters: list[Any] = list(model.parameters())
        return sum(p.ds_tensor.numel() + p.numel() for p in parameters), sum(p.ds_numel for p in parameters)


def _computed_in(precision: Precision, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with precision.autocast():
        return forward(*args, **kwargs)


class _Engine:
    """A network that is called through DeepSpeed's engine, once there is one, and otherwise is itself."""

    engine: Any = None

    def __init__(self, network: Any) -> None:
        self.network = network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


class _EngineOptimizer:
    """DeepSpeed's optimizer with the face, and the saved state, of torch's AdamW over whole parameters."""

    def __init__(
        self, engine: Any, saved_groups: list[dict[str, Any]], parameters: list[Any], precision: Precision
    ) -> None:
        self._engine, self._saved_groups, self._parameters = engine, saved_groups, parameters
        self._precision = precision

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        held: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return held

    def zero_grad(self) -> None:
        self._engine.optimizer.zero_grad()

    def step(self) -> None:
        self._engine.step()

    def state_dict(self) -> dict[str, Any]:
        """Gathered; every process must come here."""
        from deepspeed.utils import safe_get_full_optimizer_state as full

        step = next(iter(self._engine.optimizer.optimizer.state.values()))["step"]
        state = {
            number: {"step": step.clone(), **{key: full(p, key).clone() for key in _MOMENTS}}
            for number, p in enumerate(self._parameters)
        }
        return self._precision.with_state({"state": state, "param_groups": self._saved_groups})

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        self._precision.take_state(saved)
        for piece in self._engine.optimizer.fp32_partitioned_groups_flat:
            # Before the first step there are no moments yet, and setting them would pass in silence.
            self._engine.optimizer.optimizer.state[piece] = {
                "step": saved["state"][0]["step"].clone(),
                **{key: torch.zeros_like(piece) for key in _MOMENTS},
            }
        for number, parameter in enumerate(self._parameters):
            for key in _MOMENTS:
                safe_set_local_optimizer_state(parameter, self._own_piece(parameter, saved["state"][number][key]), key)

    def _own_piece(self, parameter: Any, whole: torch.Tensor) -> torch.Tensor:
        """This process's part of a whole tensor, as ZeRO-3 cuts: equal pieces, the last ones filled up with zeros."""
        size = parameter.ds_tensor.numel()
        start = dist.get_rank() * size
        piece = torch.zeros(size, dtype=whole.dtype)
        part = whole.flatten()[start : start + size]
        piece[: part.numel()] = part
        return piece


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _deepspeed_accelerator(device: torch.device, config: Mapping[str, Any]) -> Any:
    """accelerate with DeepSpeed. Told that it is on a CPU by `Accelerator(cpu=True)` it would become DDP instead."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # where ninja is
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=dict(config)))
