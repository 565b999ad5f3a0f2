"""Where the numbers of a run are also written for looking at: TensorBoard, W&B, SwanLab, MLflow.

Each library is imported only when it is asked for, and writes to disk unless its own environment variables say
otherwise. trainer_log.jsonl is written in any case and does not come from here.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from pingjia.errors import TrainingError

PROJECT = "pingjia"
INSTALL = {
    "tensorboard": "pip install 'pingjia[track]'",
    "wandb": "pip install wandb",
    "swanlab": "pip install swanlab",
    "mlflow": "pip install mlflow",
}


@dataclass(frozen=True, slots=True)
class Tracked:
    """What a tracker is told when it opens. `key` names the run for ever, over every resume; `start`: updates that
    have been made already."""

    folder: Path
    name: str
    key: str
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    start: int = 0


class Tracker(Protocol):
    """One place where numbers go. Hyper-parameters are written when it opens."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/`. Numbers of updates that a resumed run makes again are hidden."""

    def __init__(self, run: Tracked) -> None:
        _require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        folder = str(run.folder / "tensorboard")
        self._writer: Any = SummaryWriter(folder, purge_step=run.start + 1 if run.start else None)
        rows = "\n".join(f"| {key} | {value} |" for key, value in run.hyperparameters.items())
        self._writer.add_text("hyper-parameters", f"| key | value |\n|---|---|\n{rows}", run.start)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WandB:
    """Offline in `wandb/` unless WANDB_MODE says otherwise; `wandb sync` sends it later."""

    def __init__(self, run: Tracked) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # it would write between our lines
        self._run: Any = _require("wandb").init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.key,
            resume="allow",
            dir=str(run.folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(run.hyperparameters),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class SwanLab:
    """Offline in `swanlab/` unless SWANLAB_MODE says otherwise; `swanlab sync` sends it later."""

    def __init__(self, run: Tracked) -> None:
        self._library = _require("swanlab")
        self._library.init(
            project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT),
            experiment_name=run.name,
            logdir=str(run.folder / "swanlab"),
            mode=os.environ.get("SWANLAB_MODE", "offline"),
            config=dict(run.hyperparameters),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._library.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._library.finish()


class MLflow:
    """A database file `mlflow.db` beside the run unless MLFLOW_TRACKING_URI says otherwise. A resumed run goes on in
    the same MLflow run."""

    def __init__(self, run: Tracked) -> None:
        client = _require("mlflow").MlflowClient
        self._client: Any = client(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run.folder / 'mlflow.db'}"))
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        earlier = self._client.search_runs([experiment], f"tags.pingjia_key = '{run.key}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.set_terminated(self._id, "RUNNING")
            return
        self._id = self._client.create_run(experiment, tags={"pingjia_key": run.key}, run_name=run.name).info.run_id
        for key, value in run.hyperparameters.items():
            self._client.log_param(self._id, key, str(value)[:500])  # longer ones are refused

    def log(self, step: int, values: Mapping[str, float]) -> None:
        at = int(time.time() * 1000)
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, at, step)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "swanlab": SwanLab,
    "mlflow": MLflow,
}


class Trackers:
    """All trackers of a run. `with Trackers(names, run) as trackers:` closes them well on every way out.

    One that cannot be opened is a TrainingError. One that fails later is let go, with a word to `warn`: hours of
    training must not end because a chart cannot be drawn.
    """

    def __init__(self, names: Sequence[str], run: Tracked, warn: Callable[[str], None] = lambda text: None) -> None:
        self._open: dict[str, Tracker] = {}
        self._warn = warn
        for name in names:
            try:
                self._open[name] = TRACKERS[name](run)
            except TrainingError:
                self._close(failed=True)
                raise
            except Exception as e:  # every library has its own
                self._close(failed=True)
                raise TrainingError(f"report_to {name}: {_first_line(e)}; leave it out to train without it") from e

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Numbers after update `step`; None is left out."""
        there = {name: value for name, value in values.items() if value is not None}
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(step, there))  # type: ignore[misc]

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close(failed=kind is not None)

    def _close(self, *, failed: bool) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.close(failed=failed))  # type: ignore[misc]
        self._open.clear()

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as e:
            self._open.pop(name, None)
            self._warn(f"report_to {name}: {_first_line(e)}; it gets nothing more from this run")


def wanted(report_to: Sequence[str] | None) -> list[str]:
    """The trackers a recipe asks for. None: TensorBoard where it is installed."""
    if report_to is not None:
        return [name for name in report_to if name != "none"]
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []


def run_key(folder: Path, *, goes_on: bool) -> str:
    """What names the run in `folder` for ever. A run that starts over gets a new one."""
    file = folder / "run_key"
    if not goes_on or not file.exists():
        file.write_text(uuid.uuid4().hex[:16], encoding="ascii")
    return file.read_text(encoding="ascii")


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise TrainingError(
            f"report_to {name}: the library is not here ({_first_line(e)}); run: {INSTALL[name]}"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
