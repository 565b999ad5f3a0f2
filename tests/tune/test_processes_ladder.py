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


def losses(out: Path) -> list[float]:
    return [log.loss for log in read_log(out / "trainer_log.jsonl")]


def events(out: Path) -> dict[int, str]:
    return {log.step: log.event for log in read_log(out / "trainer_log.jsonl") if log.event}


def adapter(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, rows_file: Path, settings: dict) -> Path:
    """What one process learns that never runs out."""
    out = tmp_path_factory.mktemp("alone") / "out"
    model = ModelSettings(model_name_or_path=str(tiny_llama), device="cpu")
    train(model, DataSettings(dataset=[str(rows_file)]), TuneSettings(**(settings | RUN | {"output_dir": str(out)})))
    return out


@pytest.mark.parametrize(("strategy", "count"), [("ddp", 2), ("ddp", 4), ("fsdp2", 2)])
def test_all_step_down_together(train_in: Run, alone: Path, strategy: str, count: int) -> None:
    """One process runs out once at update 0 and twice at update 37."""
    out = train_in("out", strategy, count, **RUN, out_of_memory={"rank": 1, "at": {"0": 1, "37": 2}})
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
