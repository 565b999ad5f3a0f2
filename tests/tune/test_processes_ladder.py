"""Out of memory in one of several processes: all of them make do with less, and learn what one process learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from pingjia.data.settings import DataSettings
from pingjia.models.settings import ModelSettings
from pingjia.tune import train
from pingjia.tune.journal import read_log
from pingjia.tune.settings import TuneSettings

RUN: dict[str, Any] = {
    "lora_dropout": 0.0,
    "per_device_train_batch_size": 4,
    "max_steps": 39,
    "num_train_epochs": 20,
    "save_steps": 100,
}
Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path, rows_file: Path, settings: dict[str, Any], fork_ranks: Any) -> Run:
    """run(name, strategy, count, out_of_memory=..., **tune): train in processes, or with strategy none here."""

    def start(name: str, strategy: str = "none", count: int = 1, **changed: Any) -> Path:
        job = {key: changed.pop(key) for key in ("out_of_memory", "kill_at", "kill_rank") if key in changed}
        tune = settings | RUN | changed | {"output_dir": str(tmp_path / name)}
        model = {"model_name_or_path": str(tiny_llama), "device": "cpu"}
        data = {"dataset": [str(rows_file)]}
        if strategy == "none":
            train(ModelSettings(**model), DataSettings(**data), TuneSettings(**tune))
            return tmp_path / name
        tune["distributed"] = {"strategy": strategy, "processes": count, "timeout_s": 60}
        ended = fork_ranks(job | {"model": model, "data": data, "tune": tune}, count)
        failed = [(rank, said) for rank, (code, said) in enumerate(ended) if code]
        if failed:
            raise Ended(ended)
        return tmp_path / name

    return start


class Ended(Exception):
    """How processes ended of which one did not end well: [exit code, what was said] of each."""


def losses(out: Path) -> list[float]:
    return [log.loss for log in read_log(out / "trainer_log.jsonl")]


def events(out: Path) -> dict[int, str]:
    return {log.step: log.event for log in read_log(out / "trainer_log.jsonl") if log.event}


def adapter(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(("strategy", "count"), [("ddp", 2), ("ddp", 4), ("fsdp2", 2)])
def test_all_step_down_together(run: Run, strategy: str, count: int) -> None:
    """One process runs out once at update 0 and twice at update 37."""
    alone = run("alone")
    out = run("out", strategy, count, out_of_memory={"rank": 1, "at": {"0": 1, "37": 2}})
    assert losses(out) == pytest.approx(losses(alone), abs=1e-5)
    found = events(out)
    assert list(found) == [1, 38]
    assert found[1].startswith(
        "out of memory (process 1: injected after update 0): micro-batch 4 -> 2 rows, accumulation 1 -> 2"
    )
    assert "micro-batch 2 -> 1 rows" in found[38]
    assert "gradient checkpointing" in found[38]
    left, right = (safetensors.torch.load_file(each / "adapter_model.safetensors") for each in (out, alone))
    for name in left:
        assert (left[name] - right[name]).abs().max() < 5e-5
