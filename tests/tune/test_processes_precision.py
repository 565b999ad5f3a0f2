"""Half precision in several processes: what one process learns in it, overflows and resuming included."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pingjia.tune.checkpoint import checkpoints
from pingjia.tune.journal import read_log

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is needed: pip install 'pingjia[distributed]'"
)
ZERO3 = pytest.param("zero3", marks=needs_deepspeed)
RUN: dict[str, Any] = {"lora_dropout": 0.0, "per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 2}
Run = Callable[..., Path]


def losses(out: Path) -> list[float]:
    return [log.loss for log in read_log(out / "trainer_log.jsonl")]


def events(out: Path) -> dict[int, str]:
    return {log.step: log.event for log in read_log(out / "trainer_log.jsonl") if log.event}


@pytest.mark.parametrize(
    ("strategy", "key"), [("ddp", "fp16"), ("fsdp2", "bf16"), pytest.param("zero3", "bf16", marks=needs_deepspeed)]
)
def test_half_precision_learns_what_one_process_learns(train_in: Run, tmp_path: Path, strategy: str, key: str) -> None:
    one = train_in("one", **RUN)
    out = train_in("out", strategy, 2, **RUN, **{key: True}, dtypes=str(tmp_path / "dtypes"))
    assert {"fp16": "torch.float16", "bf16": "torch.bfloat16"}[key] in (tmp_path / "dtypes").read_text().split()
    assert losses(out) == pytest.approx(losses(one), rel=1e-3)
    tensors = safetensors.torch.load_file(out / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert events(out) == {}


@pytest.mark.parametrize("strategy", ["fsdp2", ZERO3])
def test_an_overflow_in_one_process_loses_no_row(train_in: Run, strategy: str) -> None:
    whole = train_in("whole", strategy, 2, fp16=True, **RUN)
    fell = train_in("fell", strategy, 2, fp16=True, overflow={"rank": 1, "at": {"0": 1, "3": 2}}, **RUN)
    found = events(fell)
    assert list(found) == [1, 4]
    assert "loss scale 65536 -> 32768, same rows again (1 attempts skipped so far)" in found[1]
    assert "32768 -> 8192" in found[4]
    assert losses(fell) == pytest.approx(losses(whole), rel=2e-3)
    state = torch.load(checkpoints(fell)[-1].path / "trainer_state.pt", weights_only=False)
    scale = state["optimizer"]["loss_scale"] if state["optimizer"] else None
    assert scale is None or (scale["scale"], scale["num_skipped"]) == (8192, 3)
