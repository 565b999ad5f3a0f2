"""Progressive training: what is trained when. One adapter throughout; a phase opens some of it and holds the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from pingjia.errors import TrainingError
from pingjia.tune.batches import BatchPlan
from pingjia.tune.distributed import local
from pingjia.tune.groups import module_of
from pingjia.tune.settings import PhaseSettings, TuneSettings


@dataclass(frozen=True, slots=True)
class Phase:
    """`modules`: full names of the modules that learn; None: all that the run trains. `plan` counts from the phase's
    own first update."""

    number: int
    name: str
    modules: frozenset[str] | None
    learning_rate: float
    plan: BatchPlan


def plan_phases(
    num_rows: int, settings: TuneSettings, modules_of: Callable[[PhaseSettings], Iterable[str]]
) -> list[Phase]:
    """The phases of a recipe, or one that trains everything."""
    if not settings.phases:
        return [Phase(0, "all", None, settings.learning_rate, _plan(num_rows, settings, None, 0))]
    phases: list[Phase] = []
    open_modules: frozenset[str] = frozenset()
    for number, wanted in enumerate(settings.phases):
        own = frozenset(modules_of(wanted))
        open_modules = open_modules | own if settings.phase_mode == "cumulative" else own
        rate = settings.learning_rate if wanted.learning_rate is None else wanted.learning_rate
        name = "+".join(wanted.target)
        phases.append(Phase(number, name, open_modules, rate, _plan(num_rows, settings, wanted, number)))
    return phases


def _plan(num_rows: int, settings: TuneSettings, phase: PhaseSettings | None, number: int) -> BatchPlan:
    own_steps = phase.max_steps if phase is not None else None
    own_epochs = phase.num_train_epochs if phase is not None else None
    return BatchPlan.of(
        num_rows,
        rows_per_micro=settings.per_device_train_batch_size,
        micros_per_update=settings.gradient_accumulation_steps,
        num_epochs=own_epochs or settings.num_train_epochs,
        max_steps=own_steps or (None if own_epochs else settings.max_steps),
        seed=settings.seed,
        phase=number,
    )


def trainable_names(model: torch.nn.Module) -> frozenset[str]:
    """What the run trains, over all its phases. Taken once, before the first phase closes anything."""
    return frozenset(name for name, p in model.named_parameters() if p.requires_grad)


def enter(model: torch.nn.Module, phase: Phase, trainable: frozenset[str]) -> list[tuple[str, torch.nn.Parameter]]:
    """Open what the phase trains, close the rest; return the open parameters. TrainingError when there is none."""
    opened = []
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.requires_grad_(_learns(name, phase.modules))
            parameter.grad = None
            if parameter.requires_grad:
                opened.append((name, parameter))
    if not opened:
        raise TrainingError(f"phase {phase.number + 1} ({phase.name}) trains nothing; check its target and layers")
    return opened


def _learns(name: str, modules: frozenset[str] | None) -> bool:
    if modules is None or ".trainable_tokens_delta." in name:  # rows of new tokens learn in every phase
        return True
    module = module_of(name)
    return module in modules or any(module.startswith(f"{m}.") for m in modules)


def frozen_digest(model: torch.nn.Module) -> str:
    """blake2b over every byte in this process that must not change while what is open learns."""
    total = hashlib.blake2b(digest_size=16)
    held: Sequence[tuple[str, torch.Tensor]] = [
        *((n, p) for n, p in model.named_parameters() if not p.requires_grad),
        *model.named_buffers(),
    ]
    for name, tensor in held:
        total.update(name.encode())
        total.update(local(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def require_untouched(model: torch.nn.Module, before: str, phase: Phase) -> None:
    """Raise TrainingError when a frozen byte has changed since `before` was taken."""
    if frozen_digest(model) != before:
        raise TrainingError(
            f"phase {phase.number + 1} ({phase.name}): weights that were frozen have changed; nothing of it is saved. "
            "This is a fault of the program or of the memory: please report it with trainer_log.jsonl"
        )
