"""The processes of one run: how they share the network, add up what they learnt, and agree.

A run in one process is `Alone`. Under `Ddp` each of n processes has the whole network and its own rows. `Fsdp2`, and
`Zero3` in zero3.py, keep about one n-th of the network in each. In all of them an update has the same rows and the same
loss: the mean over every learnt token of the update, wherever it was computed. Starting the processes is launch.py's.

What learns is whole in every process but under DeepSpeed, which shares it out with the rest and gathers it for saving.
So phases, ranks, checkpoints and the optimizer of the others are those of a run in one process.

Out of memory in one process must be that of all, or the others would wait for it. So they ask each other (`agree`),
where none of them can be inside of a message: under DDP before gradients are summed, under FSDP2 after every layer.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from pingjia.errors import PingjiaError, TrainingError
from pingjia.models.device import collective_backend, has_fused_optimizer
from pingjia.quant.bnb import is_packed_by_bnb
from pingjia.tune.frozen import layers_of
from pingjia.tune.ladder import HALF, INT4, INT8
from pingjia.tune.launch import LOST, RANK, WORLD_SIZE, is_rank
from pingjia.tune.precision import PLAIN, Precision, pick_precision
from pingjia.tune.relief import is_out_of_memory
from pingjia.tune.settings import DistributedSettings, TuneSettings

T = TypeVar("T")
_MAX_MESSAGE_NUMBERS = 2**23
"""Gradients go from process to process in messages of at most so many float32: 32 MB, which are there all the time."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What one process keeps of the network between updates."""

    rank: int
    num_parameters: int
    num_all: int

    def __str__(self) -> str:
        share = self.num_parameters / self.num_all
        return f"process {self.rank}: {self.num_parameters:,} of {self.num_all:,} parameters ({share:.1%})"


class OutOfMemorySomewhere(torch.OutOfMemoryError):
    """At least one of the processes has no memory left; all of them have been told."""


class Alone:
    """One process. Also what the others have in common: every method is what a loop needs from its processes.

    `is_cut`: whether weights are in pieces, so that a layer can be called by its network only. `refused_rungs`: of the
    ladder, for the network as it is shared out -> why. `has_ladder`: whether there is one at all.
    """

    rank = 0
    size = 1
    is_cut = False
    has_ladder = True
    refused_rungs: Mapping[str, str] = {}

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

    # ---- running out of memory

    def attempt(self, work: Callable[[], T]) -> T:
        """What `work()` returns; OutOfMemorySomewhere where it was too much for any process. In it no process waits for
        another one, or they agree inside of it."""
        return work()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether all processes are back from an attempt that took too much memory."""
        return is_out_of_memory(error)

    def watch(self, layers: Iterable[torch.nn.Module], check: Callable[[], None]) -> Callable[[], None]:
        """`check` before every layer, also when it is computed again in the backward pass. Returns what to call between
        micro-batches."""
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: check())
        return check

    def recover(self, model: Any) -> None:
        """Make the network ready for another attempt after one that was broken off."""

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
    """What several processes have in common."""

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

    def agree(self, work: Callable[[], T]) -> T:
        """What `work()` returns, or OutOfMemorySomewhere in all. Every process must come here, and `work` wait for
        none."""
        reason: str | None = None
        other: Exception | None = None
        try:
            result = work()
        except Exception as e:  # also what only stops a computation: every process comes to the question
            if is_out_of_memory(e):
                reason = str(e).splitlines()[0]
            else:
                other = e
        if self.any(reason is not None):
            first = next((rank, each) for rank, each in enumerate(self.gather(reason)) if each is not None)
            raise OutOfMemorySomewhere(f"process {first[0]}: {first[1]}")
        if other is not None:
            raise other
        return result

    def is_out_of_memory(self, error: BaseException) -> bool:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemorySomewhere):
            return isinstance(error, OutOfMemorySomewhere)
        raise TrainingError(
            f"out of memory ({str(error).splitlines()[0]}) where the other processes wait for this one, so that they "
            "cannot make do with less of it together; halve per_device_train_batch_size and double "
            "gradient_accumulation_steps, or set gradient_checkpointing=true. The last checkpoint is good"
        ) from None

    def leave(self) -> None:
        dist.destroy_process_group()


class _WholeLearning(Together):
    """What learns is whole in every process, and its gradients are summed: DDP and FSDP2."""

    _message: torch.Tensor | None = None

    def optimizer(self, model: Any, groups: list[dict[str, Any]], weight_decay: float) -> Any:
        made = super().optimizer(model, groups, weight_decay)
        parameters = parameters_of(made)
        self._message = torch.empty(
            min(_MAX_MESSAGE_NUMBERS, sum(p.numel() for p in parameters)), dtype=torch.float32, device=self.device
        )  # now, and not when gradients are there: what is there cannot be lacking later
        return made

    def clip_grad_norm_(self, optimizer: Any, max_norm: float) -> float:
        self._add_up(parameters_of(optimizer))
        return super().clip_grad_norm_(optimizer, max_norm)

    def _add_up(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Gradients summed over the processes. Bit-equal everywhere, so what learns stays equal too."""
        assert self._message is not None
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
        for pieces in messages_of(gradients, len(self._message)):
            self._sum(pieces, self._message[: sum(piece.numel() for piece in pieces)])

    def _sum(self, pieces: Sequence[torch.Tensor], message: torch.Tensor) -> None:
        parts = message.split([piece.numel() for piece in pieces])
        for part, piece in zip(parts, pieces, strict=True):
            part.copy_(piece)
        dist.all_reduce(message)
        for part, piece in zip(parts, pieces, strict=True):
            piece.copy_(part)


def messages_of(tensors: Iterable[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    """Flat tensors, in order, as lists of pieces with `size` numbers together; the last list may have fewer."""
    pieces: list[torch.Tensor] = []
    room = size
    for tensor in tensors:
        while tensor.numel():
            piece, tensor = tensor[:room], tensor[room:]
            pieces.append(piece)
            room -= piece.numel()
            if room == 0:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces


class Ddp(_WholeLearning):
    """Every process has the whole network: the fastest where it fits, and all that one process can do."""

    def prepare(self, model: Any) -> Any:
        begin_alike(model)
        return model

    def attempt(self, work: Callable[[], T]) -> T:
        return self.agree(work)

    def _count(self, model: torch.nn.Module) -> tuple[int, int]:
        count = sum(p.numel() for p in model.parameters())
        return count, count


@torch.no_grad()
def begin_alike(model: torch.nn.Module) -> None:
    """What learns begins in every process as it is in the first: other processors round otherwise."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            dist.broadcast(parameter.data, src=0)


_IN_PIECES = "the base is shared out in pieces already; load it so: quantization_bit=8 or 4"


class Fsdp2(_WholeLearning):
    """torch's `fully_shard`: what does not learn is shared out, layer by layer. Not accelerate's FSDP plugin, which
    quietly becomes DDP on a CPU."""

    is_cut = True
    refused_rungs: Mapping[str, str] = dict.fromkeys((HALF, INT8, INT4), _IN_PIECES)

    def prepare(self, model: Any) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        require_shareable(model)
        begin_alike(model)
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

    def watch(self, layers: Iterable[torch.nn.Module], check: Callable[[], None]) -> Callable[[], None]:
        """They agree after every layer, whose weights are there by then, and before its backward pass."""
        for layer in layers:
            layer.forward = partial(self._watched, layer.forward, check)
        return partial(self.agree, check)

    def _watched(self, forward: Callable[..., Any], check: Callable[[], None], *args: Any, **kwargs: Any) -> Any:
        def work() -> Any:
            check()
            return forward(*args, **kwargs)

        def look(grad: torch.Tensor) -> None:
            self.agree(check)

        result = self.agree(work)
        states = result[0] if isinstance(result, tuple) else result
        if states.requires_grad:
            states.register_hook(look)
        return result

    def recover(self, model: Any) -> None:
        state = model._get_fsdp_state()
        state._root_post_backward_final_callback()  # what ends a backward pass; nothing public ends one broken off


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
                "alone; set it to ddp, fsdp2 or zero3"
            )
        return
    if not is_rank():
        raise TrainingError(
            f"distributed.strategy={strategy} needs its processes: start it with `pingjia train`, or by torchrun, "
            f"which sets {RANK} and {WORLD_SIZE}"
        )
    _require_fitting_type(settings)
    if strategy == "zero3":
        _require_for_zero3(settings)


def _require_fitting_type(settings: TuneSettings) -> None:
    strategy, kind = settings.distributed.strategy, settings.finetuning_type
    if strategy == "fsdp2" and kind != "lora":
        raise TrainingError(
            "distributed.strategy=fsdp2 shares out what does not learn and keeps what learns whole in every process, "
            f"so finetuning_type={kind} gains nothing; use distributed.strategy=ddp, or zero3 with finetuning_type=full"
        )
    if strategy == "zero3" and kind == "freeze":
        raise TrainingError(
            "distributed.strategy=zero3 gathers only what learns when it saves, and finetuning_type=freeze saves the "
            "whole model; use finetuning_type=full or lora, or distributed.strategy=ddp"
        )


def _require_for_zero3(settings: TuneSettings) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise TrainingError("distributed.strategy=zero3 needs DeepSpeed; run: pip install 'pingjia[distributed]'")
    for key, is_set in (
        ("phases", settings.phases),
        ("shrink_lora_rank_to", settings.shrink_lora_rank_to),
        ("lora_l2", settings.lora_l2),
        ("memory_limit_gb", settings.memory_limit_gb),
    ):
        if is_set:
            raise TrainingError(
                f"{key}: DeepSpeed holds every parameter in pieces and does not let it be opened, closed, resized or "
                "looked at in the loss, nor an update be broken off; use distributed.strategy=fsdp2 or ddp"
            )


@contextmanager
def joined(settings: TuneSettings, device: torch.device) -> Iterator[Alone]:
    """While open, this is one of the run's processes, or the only one.

    After an error nobody waits for the others: they fail as soon as they miss this one, with a TrainingError that says
    so.
    """
    try:
        ranks = _join(settings, device)
        yield ranks
        ranks.leave()
    except RuntimeError as e:  # DistError too
        if not is_loss(e):
            raise
        raise TrainingError(
            f"{LOST} ({_short(e)}): that one was ended, or its machine or the network failed. The output of the "
            "launcher on its machine says which; the same command goes on from the last checkpoint"
        ) from None


_LOSSES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Socket Timeout",
    "Timed out waiting",
    "Timed out after",
    "Remote process has terminated",  # NCCL's remote error
)


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another process does not answer any more."""
    return any(text in str(error) for text in _LOSSES)


def _short(error: BaseException) -> str:
    """Its first line, without the place in the library."""
    return str(error).splitlines()[0].rpartition("] ")[2] if "gloo" in str(error) else str(error).splitlines()[0]


def _join(settings: TuneSettings, device: torch.device) -> Alone:
    wanted: DistributedSettings = settings.distributed
    require_possible(settings)
    precision = pick_precision(settings, device)
    if wanted.strategy == "none":
        return Alone(device, precision)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    backend = collective_backend(device)
    if backend == "gloo":
        face_the_first()
    dist.init_process_group(backend, timeout=timedelta(seconds=wanted.timeout_s))
    if wanted.strategy != "zero3":
        return {"ddp": Ddp, "fsdp2": Fsdp2}[wanted.strategy](device, precision)
    from pingjia.tune.zero3 import Zero3, deepspeed_config

    return Zero3(device, precision, deepspeed_config(settings))


def face_the_first() -> None:
    """Have gloo offer the others the address by which this machine reaches the first process.

    By itself it takes what the machine's own name resolves to, which is 127.0.1.1 on Debian: no other machine gets
    there. GLOO_SOCKET_IFNAME, where it is set, is left alone.
    """
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
        names = [name for name, found in psutil.net_if_addrs().items() if any(each.address == own for each in found)]
        if names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


def local_rank() -> int | None:
    """Which of this machine's processes this is; None in a run of one process."""
    text = os.environ.get("LOCAL_RANK")
    return int(text) if text is not None else None
