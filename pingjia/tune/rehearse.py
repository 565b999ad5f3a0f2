"""A training run in small, before the real one: the longest batch, save and reload. Leaves nothing behind.

Reads, builds, plans its memory and steps down as the real run does, by the same code.
"""

from __future__ import annotations

import tempfile
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
from pingjia.tune.loop import try_run
from pingjia.tune.memory import MemoryPlan
from pingjia.tune.plan import plan_of
from pingjia.tune.run import Hooks, build, read_inputs
from pingjia.tune.settings import TuneSettings
from pingjia.tune.trained import Trained


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What the run would be, and what its longest micro-batch took on this machine (after one to warm up).

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
    memory: MemoryPlan | None
    event: str | None


def rehearse(model_settings: ModelSettings, data_settings: DataSettings, settings: TuneSettings) -> Rehearsal:
    """Two updates on the longest batch, then what was trained saved, read back and compared bit by bit.

    Raises what the real run would raise, and TrainingError when the saved weights are not those in memory.
    """
    device = pick_device(model_settings.device)
    with tempfile.TemporaryDirectory() as folder, Meter() as meter:
        elsewhere = settings.model_copy(update={"output_dir": folder, "resume_from_checkpoint": False})
        inputs = read_inputs(model_settings, data_settings, elsewhere, device)
        job = build(inputs, Alone(device), Hooks())
        plan = plan_of(job.run, job.targets, inputs.dropped)
        trial = try_run(job.run)
        _check_saved(job.run.trained, Path(folder) / "saved")
    result, phases = trial.result, job.run.phases
    all_tokens = plan.num_tokens * plan.num_steps / phases[0].plan.updates_per_epoch
    return Rehearsal(
        num_rows=plan.num_rows,
        num_dropped=len(plan.dropped),
        num_steps=plan.num_steps,
        num_trainable=plan.num_trainable,
        batch_tokens=result.num_tokens,
        loss=result.loss,
        seconds=result.seconds,
        peak_bytes=meter.peak_bytes,
        seconds_estimated=all_tokens * result.seconds / result.num_tokens,
        memory=plan.memory,
        event=trial.event,
    )


def _check_saved(trained: Trained, folder: Path) -> None:
    with new_directory(folder, trained.weight_bytes) as partial:
        trained.write(partial)
        saved = safetensors.torch.load_file(partial / trained.file)
    held = trained.tensors()
    different = [name for name in held if name not in saved or not torch.equal(saved[name], held[name].cpu())]
    if different or len(saved) != len(held):
        raise TrainingError(f"the saved {trained.what} is not the one in memory: {len(different)} tensors differ")
