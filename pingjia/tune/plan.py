"""What a run is about to do, told before its first update: rows, rates, memory. Nothing is trained or printed here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pingjia.tune.forecast import forecast
from pingjia.tune.groups import RateGroup
from pingjia.tune.loop import Run, rate_groups
from pingjia.tune.lora import Targets, count_parameters
from pingjia.tune.memory import MemoryPlan
from pingjia.tune.phases import trainable_names


@dataclass(frozen=True, slots=True)
class RateRow:
    """A line of the table of rates: which layers, which modules in them, at what peak rate, how many parameters."""

    phase: str
    layers: str
    modules: tuple[str, ...]
    rate: float
    num_parameters: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What is about to be trained; handed to `on_plan` before the first update."""

    finetuning_type: str
    targets: Targets
    num_trainable: int
    num_parameters: int
    num_rows: int
    num_tokens: int
    num_learnt: int
    num_steps: int
    longest: int
    rates: tuple[RateRow, ...]
    resume_from: Path | None
    dropped: tuple[str, ...]
    memory: MemoryPlan | None = None  # None: memory is off


def plan_of(run: Run, targets: Targets, dropped: list[str]) -> TrainPlan:
    """What a run that is built is about to do."""
    trainable, total = count_parameters(run.model)
    return TrainPlan(
        finetuning_type=run.settings.finetuning_type,
        targets=targets,
        num_trainable=trainable,
        num_parameters=total,
        num_rows=len(run.rows),
        num_tokens=sum(len(row.ids) for row in run.rows),
        num_learnt=sum(row.num_learnt for row in run.rows),
        num_steps=run.num_steps,
        longest=max(len(row.ids) for row in run.rows),
        rates=_rates(run),
        resume_from=run.resume_from,
        dropped=tuple(dropped),
        memory=forecast(run) if run.settings.memory == "auto" else None,
    )


def _rates(run: Run) -> tuple[RateRow, ...]:
    """The rates of every phase. Leaves all that the run trains open, as it found it."""
    trainable = trainable_names(run.model)
    rows = []
    for phase in run.phases:
        groups: list[RateGroup] = rate_groups(run, phase, trainable)
        rows += [RateRow(phase.name, g.label, g.modules, g.rate, g.count, phase.plan.num_steps) for g in groups]
    for name, parameter in run.model.named_parameters():
        if name in trainable:
            parameter.requires_grad_(True)
    return tuple(rows)
