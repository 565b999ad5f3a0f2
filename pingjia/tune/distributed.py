"""The processes of one run: how they share the network, add up what they learnt, and agree.

A run in one process is `Alone`. `Fsdp2`, and `Zero3` in zero3.py, keep about one n-th of the network in each of n
processes. In all three an update has the same rows and the same loss: the mean over every learnt token of the update,
wherever it was computed. Starting the processes is launch.py's.

The adapter is whole in every process under FSDP2: it is a hundredth of the network, and so phases, ranks, checkpoints
and the optimizer are those of a run in one process. DeepSpeed shares it out with the rest; it is gathered for saving.
"""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from pingjia.errors import PingjiaError, TrainingError
from pingjia.models.device import collective_backend, has_fused_optimizer
from pingjia.quant.bnb import is_packed_by_bnb
from pingjia.tune.frozen import layers_of
from pingjia.tune.launch import RANK, WORLD_SIZE, is_rank
from pingjia.tune.precision import PLAIN, Precision, pick_precision
from pingjia.tune.settings import DistributedSettings, TuneSettings

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Holding:
    """What one process keeps of the network between updates."""

    rank: int
    num_parameters: int
    num_all: int

    def __str__(self) -> str:
        share = self.num_parameters / self.num_all
        return f"process {self.rank}: {self.num_parameters:,} of {self.num_all:,} parameters ({share:.1%})"


class Alone:
    """One process. Also what the others have in common: every method is what a loop needs from its processes."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device, precision: Precision = PLAIN) -> None:
        self.device, self.precision = device, precision

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    # ---- the network and its optimizer

    def prepare(self, model: Any) -> Any:
        """The network as it is to be called. Its weights must be those the run begins with."""
        return model

    def holdings(self, model: torch.nn.Module) -> list[Holding]:
        """What each process keeps; empty for one process."""
        return []

    def optimizer(self, model: Any, groups: list[dict[str, Any]], weight_decay: float) -> Any:
        """AdamW over parameter groups. Its state holds what the precision has to remember."""
        made = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=has_fused_optimizer(self.device))
        self.precision.attach(made)
        return made

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this process's part of the update's loss."""
        self.precision.scaled(loss).backward()

    def clip_grad_norm_(self, optimizer: Any, max_norm: float) -> float:
        """Make gradients those of the whole update, scale them down to `max_norm`; return their norm before."""
        self.precision.unscale(optimizer)
        return float(torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), max_norm))

    def step(self, optimizer: Any) -> None:
        """Make the update; every gradient must be a number."""
        self.precision.step(optimizer)

    @contextmanager
    def whole(self, model: torch.nn.Module) -> Iterator[None]:
        """While open, all that learns is whole in the first process. Every process must come here."""
        yield

    # ---- agreeing

    def total(self, *numbers: float) -> list[float]:
        """Sum of each number over the processes."""
        return list(numbers)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make()` returns, or raises, in the first process. It runs there only."""
        return make()

    def gather(self, value: T) -> list[T]:
        """Everyone's value, in order."""
        return [value]

    def leave(self) -> None:
        """The run is over."""


ALONE = Alone(torch.device("cpu"))


def parameters_of(optimizer: Any) -> list[torch.nn.Parameter]:
    """What an optimizer moves."""
    return [p for group in optimizer.param_groups for p in group["params"]]


class Together(Alone, ABC):
    """What FSDP2 and ZeRO-3 share."""

    def __init__(self, device: torch.device, precision: Precision = PLAIN) -> None:
        super().__init__(device, precision)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def holdings(self, model: torch.nn.Module) -> list[Holding]:
        held, whole = self._count(model)
        return [Holding(rank, count, whole) for rank, count in enumerate(self.gather(held))]

    @abstractmethod
    def _count(self, model: torch.nn.Module) -> tuple[int, int]:
        """(numbers in this process, numbers in all)."""

    def total(self, *numbers: float) -> list[float]:
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        return self.total(float(flag))[0] > 0

    def from_first(self, make: Callable[[], T]) -> T:
        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = make()
            except PingjiaError as e:
                box[1] = e
        dist.broadcast_object_list(box, src=0, device=self.device)
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        dist.destroy_process_group()


class Fsdp2(Together):
    """torch's `fully_shard`: what does not learn is shared out, layer by layer. Not accelerate's FSDP plugin, which
    quietly becomes DDP on a CPU."""

    def prepare(self, model: Any) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        require_shareable(model)
        mesh = init_device_mesh(self.device.type, (self.size,))
        learning = {p for p in model.parameters() if p.requires_grad}
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh, ignored_params=learning)
        return fully_shard(model, mesh=mesh, ignored_params=learning)

    @contextmanager
    def whole(self, model: torch.nn.Module) -> Iterator[None]:
        # After a forward pass without a backward one the outermost weights are still gathered. Saving, which only one
        # process does, shares them out again; the others would then wait for other messages than it sends.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        yield

    def _count(self, model: torch.nn.Module) -> tuple[int, int]:
        parameters = list(model.parameters())
        return sum(local(p).numel() for p in parameters), sum(p.numel() for p in parameters)

    def clip_grad_norm_(self, optimizer: Any, max_norm: float) -> float:
        self._add_up(parameters_of(optimizer))
        return super().clip_grad_norm_(optimizer, max_norm)

    def _add_up(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Gradients summed over the processes, in one message. Bit-equal everywhere, so the adapters stay equal too."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten().float() for g in gradients])
        dist.all_reduce(flat)
        for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(piece.view_as(gradient))


def require_shareable(model: torch.nn.Module) -> None:
    """Refuse weights that cannot be cut in pieces: bitsandbytes keeps their scales beside them, where none looks."""
    packed = next((name for name, module in model.named_modules() if is_packed_by_bnb(module)), None)
    if packed is not None:
        raise TrainingError(
            f"quantization_method=bitsandbytes: {packed} cannot be shared out among processes; use "
            "quantization_method=pingjia, or leave out distributed.strategy"
        )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def require_possible(settings: TuneSettings) -> None:
    """Refuse what several processes cannot do, before anything is loaded."""
    strategy = settings.distributed.strategy
    if strategy == "none":
        if int(os.environ.get(WORLD_SIZE, 1)) != 1:
            raise TrainingError(
                f"started as {os.environ[WORLD_SIZE]} processes, but distributed.strategy is none, so each would train "
                "alone; set it to fsdp2 or zero3"
            )
        return
    if not is_rank():
        raise TrainingError(
            f"distributed.strategy={strategy} needs its processes: start it with `pingjia train`, or by torchrun, "
            f"which sets {RANK} and {WORLD_SIZE}"
        )
    if settings.memory_limit_gb is not None:
        raise TrainingError(
            "memory_limit_gb: several processes cannot step down to less memory by themselves yet; leave it out, and "
            "lower per_device_train_batch_size or set gradient_checkpointing=true"
        )
    _require_fitting_type(settings)
    if strategy == "zero3":
        _require_for_zero3(settings)


def _require_fitting_type(settings: TuneSettings) -> None:
    strategy, kind = settings.distributed.strategy, settings.finetuning_type
    if strategy == "fsdp2" and kind != "lora":
        raise TrainingError(
            "distributed.strategy=fsdp2 shares out what does not learn and keeps what learns whole in every process, "
            f"so finetuning_type={kind} gains nothing; use distributed.strategy=zero3 with finetuning_type=full"
        )
    if strategy == "zero3" and kind == "freeze":
        raise TrainingError(
            "distributed.strategy=zero3 gathers only what learns when it saves, and finetuning_type=freeze saves the "
            "whole model; use finetuning_type=full or lora, or one process"
        )


def _require_for_zero3(settings: TuneSettings) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise TrainingError("distributed.strategy=zero3 needs DeepSpeed; run: pip install 'pingjia[distributed]'")
    for key, is_set in (
        ("phases", settings.phases),
        ("shrink_lora_rank_to", settings.shrink_lora_rank_to),
        ("lora_l2", settings.lora_l2),
        ("fp16", settings.fp16),
        ("bf16", settings.bf16),
    ):
        if is_set:
            raise TrainingError(
                f"{key}: DeepSpeed holds every parameter in pieces and does not let it be opened, closed, resized or "
                "looked at in the loss, and scales it by itself; use distributed.strategy=fsdp2"
            )


@contextmanager
def joined(settings: TuneSettings, device: torch.device) -> Iterator[Alone]:
    """While open, this is one of the run's processes, or the only one.

    After an error nobody waits for the others: they fail as soon as they miss this one.
    """
    ranks = _join(settings, device)
    yield ranks
    ranks.leave()


def _join(settings: TuneSettings, device: torch.device) -> Alone:
    wanted: DistributedSettings = settings.distributed
    require_possible(settings)
    precision = pick_precision(settings, device)
    if wanted.strategy == "none":
        return Alone(device, precision)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    dist.init_process_group(collective_backend(device), timeout=timedelta(seconds=wanted.timeout_s))
    if wanted.strategy == "fsdp2":
        return Fsdp2(device, precision)
    from pingjia.tune.zero3 import Zero3, deepspeed_config

    return Zero3(device, deepspeed_config(settings))


def local_rank() -> int | None:
    """Which of this machine's processes this is; None in a run of one process."""
    text = os.environ.get("LOCAL_RANK")
    return int(text) if text is not None else None
