"""A run that was interrupted, in whatever way, ends with the very bytes of one that was not."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pingjia.data.settings import DataSettings
from pingjia.errors import StorageError, TrainingError
from pingjia.ledger import Ledger
from pingjia.models.settings import ModelSettings
from pingjia.tune import Hooks, TrainResult, train
from pingjia.tune import checkpoint as checkpoint_file
from pingjia.tune.checkpoint import checkpoints
from pingjia.tune.journal import read_log
from pingjia.tune.loop import SHRUNK
from pingjia.tune.settings import TuneSettings

Train = Callable[..., TrainResult]
Killed = Callable[..., int]


def weights(directory: Path) -> str:
    return hashlib.sha256((directory / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, rows_file: Path, settings: dict[str, Any]
) -> TrainResult:
    """The uninterrupted run of the room's settings."""
    tune = TuneSettings(output_dir=str(tmp_path_factory.mktemp("whole") / "out"), **settings)
    model = ModelSettings(model_name_or_path=str(tiny_llama), device="cpu")
    return train(model, DataSettings(dataset=[str(rows_file)]), tune)


def stop_after(step: int) -> Hooks:
    """Ends a run as Ctrl-C does, after `step` updates."""
    seen: list[int] = []
    return Hooks(on_step=lambda log: seen.append(log.step), should_stop=lambda: seen[-1] >= step)


EVENTFUL: dict[str, Any] = {
    "learning_rate": 0.03,
    "num_train_epochs": 12,
    "lora_dropout": 0.0,
    "lora_l2": 1e-8,
    "phases": [
        {"target": "all"},
        {"target": "ffn,embedding", "max_steps": 6},
        {"target": "embedding", "max_steps": 5},
    ],
    "eval_steps": 2,
    "early_stopping_patience": 4,
    "shrink_lora_rank_to": 2,
    "save_steps": 3,
}
"""Three phases; the rank shrinks; early stopping ends a phase."""


@pytest.fixture(scope="session")
def eventful(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Path,
    rows_file: Path,
    contradiction: Path,
    settings: dict[str, Any],
) -> tuple[TrainResult, dict[str, Any]]:
    """The uninterrupted eventful run, and its job for killed_run.py."""
    job: dict[str, Any] = {
        "model": {"model_name_or_path": str(tiny_llama), "device": "cpu"},
        "data": {"dataset": str(rows_file), "eval_dataset": str(contradiction)},
        "tune": settings | EVENTFUL | {"output_dir": str(tmp_path_factory.mktemp("eventful") / "out")},
    }
    result = train(
        ModelSettings.model_validate(job["model"]),
        DataSettings.model_validate(job["data"]),
        TuneSettings.model_validate(job["tune"]),
    )
    return result, job


def test_the_eventful_run_has_its_events(eventful: tuple[TrainResult, dict[str, Any]]) -> None:
    logs = read_log(eventful[0].output_dir / "trainer_log.jsonl")
    events = [log.event for log in logs if log.event]
    assert {log.phase for log in logs} == {"all", "ffn+embedding", "embedding"}
    assert any(event.startswith(SHRUNK) for event in events)
    assert any(event.startswith("stopped early") for event in events)


@pytest.mark.parametrize("seed", range(20))
def test_an_eventful_run_killed_at_any_moment_ends_with_the_same_bytes(
    killed: Killed, eventful: tuple[TrainResult, dict[str, Any]], tmp_path: Path, seed: int
) -> None:
    """In any phase, before and after the rank shrank, while looks without a better loss are being counted."""
    result, job = eventful
    assert killed(job, tmp_path / "killed", seed) >= 1, "nothing was killed: the test has shown nothing"
    assert weights(tmp_path / "killed") == weights(result.output_dir)
    logs, expected = (read_log(f / "trainer_log.jsonl") for f in (tmp_path / "killed", result.output_dir))
    strip = [(log.step, log.loss, log.eval_loss, log.phase, log.event, log.l2) for log in logs]
    assert strip == [(log.step, log.loss, log.eval_loss, log.phase, log.event, log.l2) for log in expected]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_runs_end_with_the_bytes_of_an_uninterrupted_one(
    killed: Killed, whole: TrainResult, tmp_path: Path, tiny_llama: Path, rows_file: Path, settings: dict, seed: int
) -> None:
    folder = tmp_path / "killed"
    job = {
        "model": {"model_name_or_path": str(tiny_llama), "device": "cpu"},
        "data": {"dataset": str(rows_file)},
        "tune": settings,
    }
    assert killed(job, folder, seed) >= 1, "nothing was killed: the test has shown nothing"
    assert weights(folder) == weights(whole.output_dir)
    assert not list(folder.glob(".*.partial"))
    assert [log.step for log in read_log(folder / "trainer_log.jsonl")] == list(range(1, 9))


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_a_stopped_run_goes_on_bit_for_bit(tune: Train, whole: TrainResult, tmp_path: Path, step: int) -> None:
    stopped = tune(hooks=stop_after(step))
    assert not stopped.finished
    assert stopped.num_steps == step
    assert checkpoints(tmp_path / "out")[-1].step == step
    assert not (tmp_path / "out" / "pingjia.json").exists()
    again = tune()
    assert again.finished
    assert not again.was_finished
    assert weights(tmp_path / "out") == weights(whole.output_dir)
    assert (again.num_steps, again.last_loss) == (whole.num_steps, whole.last_loss)
    assert (again.trained_tokens, again.learnt_tokens) == (whole.trained_tokens, whole.learnt_tokens)


def test_every_seed_is_its_own_run(tune: Train, whole: TrainResult, tmp_path: Path) -> None:
    """Else the comparison of bytes above could not fail."""
    tune(seed=1)
    assert weights(tmp_path / "out") != weights(whole.output_dir)


def test_the_random_state_is_part_of_a_checkpoint(tune: Train, whole: TrainResult, tmp_path: Path) -> None:
    """With dropout, going on with another random state must give other weights."""
    tune(hooks=stop_after(3))
    file = checkpoints(tmp_path / "out")[-1].path / "trainer_state.pt"
    state = torch.load(file, weights_only=True)
    state["rng"][0]["cpu"] = torch.Generator().manual_seed(99).get_state()
    torch.save(state, file)
    tune()
    assert weights(tmp_path / "out") != weights(whole.output_dir)


def test_a_finished_run_is_nothing_to_do(tune: Train, tmp_path: Path) -> None:
    first = tune()
    before = weights(tmp_path / "out")
    second = tune()
    assert second.was_finished
    assert second.finished
    assert second.last_loss == first.last_loss
    assert second.stored_bytes == first.stored_bytes
    assert weights(tmp_path / "out") == before


def test_where_it_is_kept_does_not_make_it_another_run(tune: Train) -> None:
    tune()
    assert tune(save_steps=5, save_total_limit=1).was_finished


@pytest.mark.parametrize("changed", [{"learning_rate": 2e-3}, {"lora_rank": 2}, {"seed": 8}, {"lora_dropout": 0.0}])
def test_changed_settings_do_not_mix_with_a_finished_run(tune: Train, tmp_path: Path, changed: dict[str, Any]) -> None:
    tune()
    before = weights(tmp_path / "out")
    with pytest.raises(TrainingError, match="holds a finished adapter of a run with other"):
        tune(**changed)
    assert weights(tmp_path / "out") == before
    assert tune(**changed, resume_from_checkpoint=False).finished
    assert weights(tmp_path / "out") != before


def test_changed_settings_do_not_mix_with_an_unfinished_run(tune: Train, tmp_path: Path) -> None:
    tune(hooks=stop_after(4))
    with pytest.raises(TrainingError, match=r"checkpoint-000004 belongs to a run with other"):
        tune(learning_rate=2e-3)
    assert tune(learning_rate=2e-3, resume_from_checkpoint=False).finished
    tune(learning_rate=2e-3, output_dir=str(tmp_path / "fresh"))
    assert weights(tmp_path / "out") == weights(tmp_path / "fresh")


def test_changed_rows_are_another_run(tune: Train, tmp_path: Path, rows_file: Path) -> None:
    tune(hooks=stop_after(4))
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(rows_file.read_text(encoding="utf-8").splitlines(True)[1:]), encoding="utf-8")
    with pytest.raises(TrainingError, match="other data"):
        tune(dataset=fewer)


def test_another_base_is_another_run(tune: Train, make_llama: Callable[..., Path]) -> None:
    tune(hooks=stop_after(4))
    with pytest.raises(TrainingError, match="base model"):
        tune(model=make_llama(5))


def test_one_run_at_a_time_in_a_directory(tune: Train, tmp_path: Path) -> None:
    refused: list[str] = []

    def start_another(log: object) -> None:
        with pytest.raises(TrainingError, match="another run is writing to") as caught:
            tune()
        refused.append(str(caught.value))

    assert tune(hooks=Hooks(on_step=start_another), max_steps=2).finished
    assert len(refused) == 2


def test_a_damaged_checkpoint_is_named(tune: Train, tmp_path: Path) -> None:
    tune(hooks=stop_after(5))
    file = checkpoints(tmp_path / "out")[-1].path / "trainer_state.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TrainingError, match=r"checkpoint-000005: damaged: .*; delete it to go on"):
        tune()


def test_resume_from_a_directory_that_is_no_checkpoint(tune: Train, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"not a checkpoint: trainer_state\.pt is missing"):
        tune(resume_from_checkpoint=str(tmp_path))


def test_resume_from_a_named_checkpoint_into_another_directory(tune: Train, whole: TrainResult, tmp_path: Path) -> None:
    tune(save_total_limit=9)
    at_4 = tmp_path / "out" / "checkpoint-000004"
    again = tune(output_dir=str(tmp_path / "b"), resume_from_checkpoint=str(at_4))
    assert again.trained_tokens == whole.trained_tokens
    assert weights(tmp_path / "b") == weights(whole.output_dir)


def test_resume_from_the_last_checkpoint_of_all(tune: Train, whole: TrainResult, tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and the adapter, the log lost too."""
    tune()
    for name in ("pingjia.json", "adapter_model.safetensors", "trainer_log.jsonl"):
        (tmp_path / "out" / name).unlink()
    again = tune()
    assert not again.was_finished
    assert (again.num_steps, again.last_loss) == (whole.num_steps, whole.last_loss)
    assert weights(tmp_path / "out") == weights(whole.output_dir)


def test_a_checkpoint_without_its_log_is_damaged(tune: Train, tmp_path: Path) -> None:
    tune(hooks=stop_after(3))
    (checkpoints(tmp_path / "out")[-1].path / "trainer_log.jsonl").unlink()
    with pytest.raises(TrainingError, match=r"checkpoint-000003: damaged: no trainer_log\.jsonl"):
        tune()


def test_only_the_newest_checkpoints_are_kept(tune: Train, tmp_path: Path) -> None:
    tune(save_steps=1, save_total_limit=3)
    assert [c.step for c in checkpoints(tmp_path / "out")] == [6, 7, 8]


def test_a_torn_log_line_is_passed_over(tune: Train, tmp_path: Path) -> None:
    tune(hooks=stop_after(4))
    file = tmp_path / "out" / "trainer_log.jsonl"
    file.write_text(file.read_text() + '{"at": 1.0, "step": 5, "num_st', encoding="utf-8")
    tune()
    assert [log.step for log in read_log(file)] == list(range(1, 9))


def test_a_killed_run_is_billed_up_to_its_last_checkpoint(tune: Train, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")

    def fail(log: Any) -> None:
        if log.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(hooks=Hooks(on_step=fail), ledger=ledger)
    assert sum(f.trained_tokens > 0 for f in ledger.read()) == 2
    whole = tune(ledger=ledger)
    facts = list(ledger.read(kind="train"))
    assert sum(f.trained_tokens for f in facts) == whole.trained_tokens
    assert sum(f.learnt_tokens for f in facts) == whole.learnt_tokens
    assert facts[-1].stored_bytes == whole.stored_bytes


class Disk:
    """Refuses to hold more than `room` bytes of what checkpoint.py writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = float("inf")
        self._write = checkpoint_file.write_bytes
        monkeypatch.setattr(checkpoint_file, "write_bytes", self.write)
        monkeypatch.setattr(checkpoint_file, "write_state", self.write_state)

    def write_state(self, path: Path, state: Any) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.write(path, buffer.getvalue())

    def write(self, path: Path, data: bytes) -> None:
        if len(data) > self.room:
            self._write(path, data[: int(self.room)])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.room -= len(data)
        self._write(path, data)


def test_a_disk_that_fills_at_any_file_loses_nothing(
    tune: Train, whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room runs out at the second checkpoint: first for its weights, then only for what comes after them."""
    disk = Disk(monkeypatch)
    size = (whole.output_dir / "adapter_model.safetensors").stat().st_size
    for room in (0, size + 5000):
        disk.room = float("inf")

        def fill(log: Any, room: int = room) -> None:
            if log.step == 4:
                disk.room = room

        with pytest.raises(StorageError, match=r"disk is full; the last good one is .*checkpoint-000002"):
            tune(hooks=Hooks(on_step=fill))
        assert [c.step for c in checkpoints(tmp_path / "out")] == [2]
        assert not list((tmp_path / "out").glob(".*.partial"))
    disk.room = float("inf")
    assert tune().finished
    assert weights(tmp_path / "out") == weights(whole.output_dir)


def test_a_disk_that_fills_at_the_adapter(
    tune: Train, whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    saved: list[int] = []
    real = ledger.append

    def after_last_checkpoint(fact: Any) -> Any:
        saved.append(fact.note["step"])
        if saved[-1] == 8:
            disk.room = 100
        return real(fact)

    monkeypatch.setattr(ledger, "append", after_last_checkpoint)
    with pytest.raises(StorageError, match="checkpoint-000008"):
        tune(ledger=ledger)
    assert not (tmp_path / "out" / "pingjia.json").exists()
    assert checkpoints(tmp_path / "out")[-1].step == 8
    disk.room = float("inf")
    monkeypatch.undo()
    assert tune().finished
    assert weights(tmp_path / "out") == weights(whole.output_dir)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk(tune: Train, whole: TrainResult, small_disk: Path) -> None:
    out = small_disk / "out"
    ballast = small_disk / "ballast"

    def fill(log: Any) -> None:
        if log.step == 3:
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with pytest.raises(StorageError, match=r"the disk is full; the last good one is .*checkpoint-000002"):
        tune(output_dir=str(out), hooks=Hooks(on_step=fill))
    assert ballast.exists()
    assert [c.step for c in checkpoints(out)] == [2]
    with pytest.raises(StorageError, match=r"the disk is full; the last good one is .*checkpoint-000002"):
        tune(output_dir=str(out))  # still full
    ballast.unlink()
    result = tune(output_dir=str(out), save_total_limit=1)
    assert result.finished
    assert result.trained_tokens == whole.trained_tokens
    assert weights(out) == weights(whole.output_dir)


@pytest.mark.parametrize("step", [1, 3])
def test_starting_over_can_be_interrupted_too(tune: Train, tmp_path: Path, step: int) -> None:
    """What the earlier run left must not be taken for the new one's, nor push the new one's checkpoints out."""
    tune(output_dir=str(tmp_path / "fresh"), learning_rate=2e-3)
    tune(save_steps=1)
    before = weights(tmp_path / "out")
    tune(learning_rate=2e-3, resume_from_checkpoint=False, hooks=stop_after(step))
    assert [c.step for c in checkpoints(tmp_path / "out")] == [*range(2, step, 2), step]
    assert weights(tmp_path / "out" / "previous") == before, "a finished adapter is never thrown away"
    assert (tmp_path / "out" / "previous" / "pingjia.json").is_file()
    assert not (tmp_path / "out" / "pingjia.json").exists()
    assert tune(learning_rate=2e-3).finished
    assert weights(tmp_path / "out") == weights(tmp_path / "fresh")


def test_a_new_run_that_cannot_start_leaves_the_old_one_alone(tune: Train, tmp_path: Path) -> None:
    tune()
    with pytest.raises(TrainingError, match="matches no linear"):
        tune(lora_target="nothing", resume_from_checkpoint=False)
    assert tune().was_finished
    assert not (tmp_path / "out" / "previous").exists()
