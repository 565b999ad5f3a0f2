"""A training run in small, before the real one: the longest batch, save and reload. Leaves nothing behind.

Reads, builds, plans its memory and steps down as the real run does, by the same code.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from pingjia.data.settings import DataSettings
from pingjia.errors import TrainingError
from pingjia.meter import Meter
from pingjia.models.device import pick_device
from pingjia.models.settings import ModelSettings
from pingjia.tune.checkpoint import new_directory
from pingjia.tune.distributed import Alone
from pingjia.tune.loop import Run, Trial, try_run
from pingjia.tune.memory import MemoryPlan
from pingjia.tune.plan import plan_of
from pingjia.tune.run import Hooks, build, read_inputs, train
from pingjia.tune.settings import TuneSettings
from pingjia.tune.step import StepResult
from pingjia.tune.trained import Trained

NUM_TYPICAL = 6  # updates of the plan that the estimate rests on, besides the longest batch
SHORT_RATE = 1e-3  # of the run in small, at least: what two updates have learnt must show in the logits


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What the run would be, and what its longest micro-batch took on this machine (after one to warm up).

    `seconds`, `batch_tokens`: of that batch. `seconds_estimated`, `tokens_per_s`: of all updates of the run, from a few
    that are spread over its first epoch; looks at held-out rows, loading and saving are not in them.
    `memory`: the plan of the run, None where it has none; `event`: how the run would make do with its memory, None
    where that suffices.
    """

    num_rows: int
    num_dropped: int
    num_steps: int
    num_trainable: int
    batch_tokens: int
    loss: float
    seconds: float
    peak_bytes: int
    seconds_estimated: float
    tokens_per_s: float
    memory: MemoryPlan | None
    event: str | None


def rehearse(model_settings: ModelSettings, data_settings: DataSettings, settings: TuneSettings) -> Rehearsal:
    """Two updates on the longest batch and a few of the plan, then what was trained saved and read back bit by bit.

    Raises what the real run would raise, and TrainingError when the saved weights are not those in memory.
    """
    device = pick_device(model_settings.device)
    with tempfile.TemporaryDirectory() as folder, Meter() as meter:
        elsewhere = settings.model_copy(update={"output_dir": folder, "resume_from_checkpoint": False})
        inputs = read_inputs(model_settings, data_settings, elsewhere, device)
        job = build(inputs, Alone(device), Hooks())
        plan = plan_of(job.run, job.targets, inputs.dropped)
        if not any(row.rate for row in plan.rates):
            raise TrainingError("learning_rate is 0 for everything that is trained: no weight would move; give a rate")
        trial = try_run(job.run, num_typical=NUM_TYPICAL)
        _check_saved(job.run.trained, Path(folder) / "saved")
    pace = tokens_per_s(trial)
    return Rehearsal(
        num_rows=plan.num_rows,
        num_dropped=len(plan.dropped),
        num_steps=plan.num_steps,
        num_trainable=plan.num_trainable,
        batch_tokens=trial.result.num_tokens,
        loss=trial.result.loss,
        seconds=trial.result.seconds,
        peak_bytes=meter.peak_bytes,
        seconds_estimated=all_tokens(job.run) / pace,
        tokens_per_s=pace,
        memory=plan.memory,
        event=trial.event,
    )


def tokens_per_s(trial: Trial) -> float:
    """Of the typical updates; of the longest batch where there is none. Twice as slow as the others is not typical."""
    kept = _without_stray(trial.typical) or [trial.result]
    return sum(each.num_tokens for each in kept) / sum(each.seconds for each in kept)


def _without_stray(updates: Sequence[StepResult]) -> list[StepResult]:
    """Leave out what something else on the machine has held up."""
    paces = sorted(each.seconds / each.num_tokens for each in updates)
    return [each for each in updates if each.seconds / each.num_tokens <= 2 * paces[len(paces) // 2]]


def all_tokens(run: Run) -> int:
    """Tokens of every update of every phase."""
    lengths = [len(row.ids) for row in run.rows]
    return sum(
        lengths[row] for phase in run.phases for _, micros in phase.plan.updates(0) for micro in micros for row in micro
    )


@contextmanager
def short_run(model_settings: ModelSettings, data_settings: DataSettings, settings: TuneSettings) -> Iterator[Path]:
    """Two real updates of the recipe, by `train` itself; the directory with what they left, until the block ends.

    Without held-out rows, schedule and phases, in one process, at a rate of at least SHORT_RATE.
    """
    with tempfile.TemporaryDirectory(prefix="pingjia-rehearsal-") as folder:
        changed = {
            "output_dir": str(Path(folder) / "run"),
            "max_steps": 2,
            "phases": [],
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "learning_rate": max(settings.learning_rate, SHORT_RATE),
            "layer_learning_rates": {},
            "report_to": ["none"],
            "early_stopping_patience": None,
            "shrink_lora_rank_to": None,
            "continual": settings.continual.model_copy(update={"min_retention": 0.0, "probes": {}}),
            "distributed": settings.distributed.model_copy(update={"strategy": "none"}),
        }
        rows = data_settings.model_copy(update={"eval_dataset": []})
        yield train(model_settings, rows, settings.model_copy(update=changed)).output_dir


def _check_saved(trained: Trained, folder: Path) -> None:
    with new_directory(folder, trained.weight_bytes) as partial:
        trained.write(partial)
        saved = safetensors.torch.load_file(partial / trained.file)
    held = trained.tensors()
    different = [name for name in held if name not in saved or not torch.equal(saved[name], held[name].cpu())]
    if different or len(saved) != len(held):
        raise TrainingError(f"the saved {trained.what} is not the one in memory: {len(different)} tensors differ")
