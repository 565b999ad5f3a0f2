"""What a run tells TensorBoard is read back from its files; W&B, SwanLab and MLflow are told the same, by fakes."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pingjia.errors import TrainingError
from pingjia.tune import Hooks, TrainResult, trackers
from pingjia.tune.journal import read_log
from pingjia.tune.settings import TuneSettings
from pingjia.tune.trackers import Tracked, Trackers, run_key, wanted

Train = Callable[..., TrainResult]


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    """name -> (step, value), as TensorBoard itself reads them."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="pingjia[track]")
    found = events.EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_holds_every_number_of_every_update(tune: Train, rows_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pingjia[track]")
    tune(report_to=["tensorboard"], lora_l2=0.01, layer_learning_rates={"1-2": 1e-3, "3": 2e-3}, lora_target="ffn",
         data={"eval_dataset": [str(rows_file)]}, num_train_epochs=1)  # fmt: skip
    logs = read_log(tmp_path / "out" / "trainer_log.jsonl")
    found = scalars(tmp_path / "out")
    assert [step for step, _ in found["loss/train"]] == [log.step for log in logs]
    assert [value for _, value in found["loss/train"]] == pytest.approx([log.loss for log in logs])
    assert [value for _, value in found["loss/l2"]] == pytest.approx([log.l2 for log in logs])
    assert [value for _, value in found["gradient_norm"]] == pytest.approx([log.grad_norm for log in logs])
    assert [step for step, _ in found["loss/held_out"]] == [log.step for log in logs if log.eval_loss is not None]
    lower, upper = found["rate/layers 1-2"], found["rate/layers 3"]
    assert [v for _, v in upper] == pytest.approx([2 * v for _, v in lower])
    assert max(v for _, v in upper) == pytest.approx(max(log.learning_rate for log in logs))
    assert all(value > 0 for name in found if name.startswith(("speed/", "memory/")) for _, value in found[name])
    assert {"speed/tokens_per_s", "speed/learnt_tokens_per_s", "memory/peak_gb"} <= found.keys()


def test_a_resumed_run_goes_on_in_the_same_curves(tune: Train, tmp_path: Path) -> None:
    """Updates after the checkpoint are made twice, and drawn once."""
    seen: list[int] = []

    class Crash(Exception):
        pass

    def crash(log: Any) -> None:
        seen.append(log.step)
        if log.step == 3:
            raise Crash

    with pytest.raises(Crash):
        tune(report_to=["tensorboard"], hooks=Hooks(on_step=crash))
    key = (tmp_path / "out" / "run_key").read_text()
    tune(report_to=["tensorboard"])
    assert (tmp_path / "out" / "run_key").read_text() == key
    steps = [step for step, _ in scalars(tmp_path / "out")["loss/train"]]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 3


# ---- fakes


class Fake:
    """Remembers what it was told. `breaks_at`: a step whose numbers it refuses."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.told: list[tuple[str, Any]] = []
        self.breaks_at = breaks_at

    def log(self, values: dict[str, float], step: int) -> None:
        if step == self.breaks_at:
            raise OSError("no space left")
        self.told.append(("log", (step, values)))

    def init(self, **options: Any) -> Fake:
        self.told.append(("init", options))
        return self

    def finish(self, exit_code: int | None = None) -> None:
        self.told.append(("finish", exit_code))


class FakeMlflow:
    """The part of MlflowClient that is used; `runs` outlive a client, as a database does."""

    runs: dict[str, SimpleNamespace]

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return SimpleNamespace(experiment_id="1") if self.runs else None

    def create_experiment(self, name: str) -> str:
        return "1"

    def search_runs(self, experiments: list[str], query: str) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(info=SimpleNamespace(run_id=i))
            for i, r in self.runs.items()
            if query == f"tags.pingjia_key = '{r.key}'"
        ]

    def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> SimpleNamespace:
        name = f"run{len(self.runs)}"
        self.runs[name] = SimpleNamespace(
            key=tags["pingjia_key"], params={}, metrics=[], status="RUNNING", uri=self.uri
        )
        return SimpleNamespace(info=SimpleNamespace(run_id=name))

    def log_param(self, run: str, key: str, value: str) -> None:
        assert len(value) <= 500
        self.runs[run].params[key] = value

    def log_metric(self, run: str, key: str, value: float, timestamp: int, step: int) -> None:
        self.runs[run].metrics.append((step, key, value))

    def set_terminated(self, run: str, status: str) -> None:
        self.runs[run].status = status


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """fake(name, thing): `import name` gives a module with the attributes of `thing`."""

    def put(name: str, thing: Any) -> Any:
        module = types.ModuleType(name)
        for attribute in ("init", "log", "finish", "MlflowClient"):
            if hasattr(thing, attribute):
                setattr(module, attribute, getattr(thing, attribute))
        monkeypatch.setitem(sys.modules, name, module)
        for variable in ("WANDB_MODE", "SWANLAB_MODE", "MLFLOW_TRACKING_URI", "WANDB_PROJECT"):
            monkeypatch.delenv(variable, raising=False)
        return thing

    return put


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_wandb_and_swanlab_are_told_everything_offline(
    tune: Train, tmp_path: Path, fake: Callable[..., Any], name: str
) -> None:
    told = fake(name, Fake()).told
    tune(report_to=name, num_train_epochs=1)
    logs = read_log(tmp_path / "out" / "trainer_log.jsonl")
    assert [kind for kind, _ in told] == ["init", *["log"] * len(logs), "finish"]
    options = told[0][1]
    assert options["mode"] == "offline"
    assert options["config"]["lora_rank"] == 4
    assert options["config"]["num_trainable"] > 0
    assert [(step, values["loss/train"]) for _, (step, values) in told[1:-1]] == [(log.step, log.loss) for log in logs]
    assert all(value is not None for _, (_, values) in told[1:-1] for value in values.values())
    if name == "wandb":
        assert told[-1] == ("finish", 0)


def test_mlflow_goes_on_in_the_same_run(tune: Train, tmp_path: Path, fake: Callable[..., Any]) -> None:
    client = type("Client", (FakeMlflow,), {"runs": {}})
    fake("mlflow", SimpleNamespace(MlflowClient=client))
    seen: list[int] = []
    tune(report_to="mlflow", hooks=Hooks(on_step=lambda log: seen.append(log.step), should_stop=lambda: seen[-1] >= 2))
    tune(report_to="mlflow")
    (run,) = client.runs.values()
    assert run.status == "FINISHED"
    assert run.uri == f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}"
    assert run.params["learning_rate"] == "0.001"
    steps = [step for step, name, _ in run.metrics if name == "loss/train"]
    assert steps == list(range(1, len(steps) + 1))


def test_a_run_that_fails_closes_its_trackers_as_failed(tune: Train, fake: Callable[..., Any]) -> None:
    told = fake("wandb", Fake()).told

    def fail(log: Any) -> None:
        raise RuntimeError("the page went away")

    with pytest.raises(RuntimeError, match="went away"):
        tune(report_to=["wandb"], hooks=Hooks(on_step=fail))
    assert told[-1] == ("finish", 1)


def test_a_tracker_that_breaks_is_let_go_and_the_run_goes_on(
    tune: Train, tmp_path: Path, fake: Callable[..., Any]
) -> None:
    told, warnings = fake("wandb", Fake(breaks_at=2)).told, []
    assert tune(report_to=["wandb"], hooks=Hooks(on_warning=warnings.append)).finished
    assert [kind for kind, _ in told] == ["init", "log"]
    assert warnings == ["report_to wandb: no space left; it gets nothing more from this run"]


@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow"])
def test_a_missing_library_is_named_before_the_first_update(
    tune: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrainingError, match=f"report_to {name}: the library is not here .*pip install {name}"):
        tune(report_to=[name])
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_tracker_that_cannot_open_closes_those_before_it(
    tmp_path: Path, fake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = fake("wandb", Fake()).told
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(TrainingError, match="swanlab"):
        Trackers(["wandb", "swanlab"], Tracked(tmp_path, "run", "key"))
    assert told[-1] == ("finish", 1)


def test_none_imports_nothing(tune: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise AssertionError(f"imports {name}")

    monkeypatch.setattr(trackers, "_require", refuse)
    assert tune(report_to="none", num_train_epochs=1).finished
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(**keys: Any) -> TuneSettings:
        return TuneSettings(output_dir="x", **keys)

    assert wanted(settings(report_to="none").report_to) == []
    assert wanted(settings(report_to="wandb, mlflow").report_to) == ["wandb", "mlflow"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert wanted(settings().report_to) == ["tensorboard"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert wanted(settings().report_to) == []
    with pytest.raises(ValueError, match="tensorbord"):
        settings(report_to="tensorbord")


def test_a_run_that_starts_over_is_another_run(tmp_path: Path) -> None:
    first = run_key(tmp_path, goes_on=False)
    assert run_key(tmp_path, goes_on=True) == first
    assert run_key(tmp_path, goes_on=False) != first
    assert json.dumps(first).isascii()
