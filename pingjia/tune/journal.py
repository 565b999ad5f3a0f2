"""trainer_log.jsonl: what every update of a run came to, a line each. Not here: when a line is written (`loop.py`)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pingjia.errors import StorageError, TrainingError
from pingjia.tune.checkpoint import LOG_FILE, disk_message


@dataclass(frozen=True, slots=True)
class StepLog:
    """One line of trainer_log.jsonl. Losses are nats per learnt token; `step` counts finished updates of the run.

    `epoch` counts from the start of the phase. `learning_rate` is the highest among the parameter groups. `l2`,
    `orthogonality`, `ewc`: penalties, apart from the loss. `event`: what happened after this update, for a reader.
    `rates`: of each parameter group. `peak_bytes`: most memory the first process has held.
    """

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
    phase: str | None = None
    l2: float | None = None
    event: str | None = None
    orthogonality: float | None = None
    ewc: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int = 0


def write_log(file: Path, text: str, mode: Literal["w", "a"]) -> None:
    """Replace the log by the text, or add to it. Raises StorageError when the disk refuses."""
    try:
        with open(file, mode, encoding="utf-8") as out:
            out.write(text)
    except OSError as e:
        raise StorageError(disk_message(file, e)) from None


def as_line(log: StepLog) -> str:
    """One line of JSON, with the time of now."""
    return json.dumps({"at": time.time(), **asdict(log)}) + "\n"


def as_text(logs: Sequence[StepLog]) -> str:
    """A whole log."""
    return "".join(as_line(log) for log in logs)


def restore_log(checkpoint: Path | None) -> list[StepLog]:
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
