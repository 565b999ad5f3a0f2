"""The order of a run: which update comes next, when to check, log, save and stop. Arithmetic is in step.py."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from peft import PeftModel

from pingjia.errors import StorageError, TrainingError
from pingjia.meter import peak_bytes
from pingjia.models.family import Family
from pingjia.tune.batches import BatchPlan
from pingjia.tune.checkpoint import LOG_FILE, disk_message, load_checkpoint, save_checkpoint
from pingjia.tune.guards import MOVED_AFTER_STEPS, MovedCheck
from pingjia.tune.schedule import learning_rate_at
from pingjia.tune.settings import TuneSettings
from pingjia.tune.step import MicroBatch, StepResult, build_batch, mean_loss, update
from pingjia.types import Encoded


@dataclass(frozen=True, slots=True)
class StepLog:
    """One line of trainer_log.jsonl. Losses are nats per learnt token; `step` counts finished updates."""

    step: int
    num_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_learnt: int
    seconds: float
    eval_loss: float | None = None


@dataclass(slots=True)
class Run:
    """Everything one training run needs, and what it has done so far."""

    model: PeftModel
    family: Family
    rows: Sequence[Encoded]
    eval_rows: Sequence[Encoded]
    settings: TuneSettings
    fingerprint: str
    output_dir: Path
    resume_from: Path | None = None
    observe: Callable[[StepLog], None] = lambda log: None
    should_stop: Callable[[], bool] = lambda: False
    on_saved: Callable[[], None] = lambda: None
    start: int = 0  # updates that the checkpoint it goes on from had made
    logs: list[StepLog] = field(default_factory=list)
    peak_bytes: int = 0


def plan_batches(num_rows: int, settings: TuneSettings) -> BatchPlan:
    return BatchPlan.of(
        num_rows,
        rows_per_micro=settings.per_device_train_batch_size,
        micros_per_update=settings.gradient_accumulation_steps,
        num_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
    )


def run_training(run: Run) -> bool:
    """Make every update that is left. True when complete, False when `should_stop` ended it (it is saved then)."""
    s, plan = run.settings, plan_batches(len(run.rows), run.settings)
    accelerator = Accelerator(cpu=run.model.device.type == "cpu")
    if accelerator.num_processes != 1:
        raise TrainingError(f"started as {accelerator.num_processes} processes; this version trains in one process")
    model, optimizer = accelerator.prepare(run.model, _optimizer(run.model, s))
    start = (
        load_checkpoint(run.resume_from, run.model, optimizer, fingerprint=run.fingerprint) if run.resume_from else 0
    )
    run.start = start
    run.logs = _restore_log(run.resume_from)
    _write_log(run.output_dir / LOG_FILE, _text(run.logs), "w")
    has_moved = MovedCheck(run.model) if start < MOVED_AFTER_STEPS else None
    eval_batches = _batches(run, run.eval_rows)
    model.train()
    for step, micros in plan.updates(start):
        batches = [
            build_batch([run.rows[i] for i in rows], run.family, run.model.config, run.model.device) for rows in micros
        ]
        rate = learning_rate_at(
            step, plan.num_steps, peak=s.learning_rate, kind=s.lr_scheduler_type, warmup_ratio=s.warmup_ratio
        )
        result = update(accelerator, model, optimizer, batches, learning_rate=rate, max_grad_norm=s.max_grad_norm)
        done, last = step + 1, step + 1 == plan.num_steps
        if has_moved and done == min(start + MOVED_AFTER_STEPS, plan.num_steps) and done > 1:
            has_moved(run.model)
        eval_loss = (
            mean_loss(model, eval_batches) if eval_batches and (last or done % plan.updates_per_epoch == 0) else None
        )
        _log(run, plan, done, rate, result, eval_loss)
        stopping = run.should_stop() and not last
        if stopping or last or done % s.save_steps == 0:
            save_checkpoint(
                run.output_dir,
                done,
                run.model,
                optimizer,
                fingerprint=run.fingerprint,
                log=_text(run.logs),
                keep=s.save_total_limit,
            )
            run.on_saved()
        if stopping:
            return False
    return True


def _optimizer(model: PeftModel, settings: TuneSettings) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def _batches(run: Run, rows: Sequence[Encoded]) -> list[MicroBatch]:
    size = run.settings.per_device_train_batch_size
    return [
        build_batch(rows[i : i + size], run.family, run.model.config, run.model.device)
        for i in range(0, len(rows), size)
    ]


def _log(run: Run, plan: BatchPlan, done: int, rate: float, result: StepResult, eval_loss: float | None) -> None:
    log = StepLog(
        step=done,
        num_steps=plan.num_steps,
        epoch=round(done / plan.updates_per_epoch, 4),
        loss=result.loss,
        learning_rate=rate,
        grad_norm=result.grad_norm,
        num_tokens=result.num_tokens,
        num_learnt=result.num_learnt,
        seconds=round(result.seconds, 4),
        eval_loss=eval_loss,
    )
    run.logs.append(log)
    run.peak_bytes = max(run.peak_bytes, peak_bytes())
    _write_log(run.output_dir / LOG_FILE, _line(log), "a")
    run.observe(log)


def _write_log(file: Path, text: str, mode: Literal["w", "a"]) -> None:
    try:
        with open(file, mode, encoding="utf-8") as out:
            out.write(text)
    except OSError as e:
        raise StorageError(disk_message(file, e)) from None


def _line(log: StepLog) -> str:
    return json.dumps({"at": time.time(), **asdict(log)}) + "\n"


def _text(logs: Sequence[StepLog]) -> str:
    return "".join(_line(log) for log in logs)


def _restore_log(checkpoint: Path | None) -> list[StepLog]:
    """The updates that a checkpoint holds. Its own copy: the log of output_dir may be torn, lost, or further on."""
    if checkpoint is None:
        return []
    logs = read_log(checkpoint / LOG_FILE)
    if not logs:
        raise TrainingError(f"{checkpoint}: damaged: no {LOG_FILE} in it; delete it to go on from the one before")
    return logs


def read_log(file: Path) -> list[StepLog]:
    """The lines of a trainer_log.jsonl; a torn last line (a crash in mid-write) is passed over."""
    logs = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
            row.pop("at", None)
            logs.append(StepLog(**row))
        except (ValueError, TypeError):
            continue
    return logs
