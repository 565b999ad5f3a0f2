"""A process that is killed ends the others soon, with the cause; the run goes on as if nothing had happened."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pingjia.tune.checkpoint import checkpoints
from pingjia.tune.journal import read_log
from pingjia.tune.launch import LOST

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is needed: pip install 'pingjia[distributed]'"
)
RUN: dict[str, Any] = {"lora_dropout": 0.2, "per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 2}


@pytest.mark.parametrize(
    ("strategy", "count"), [("ddp", 4), ("fsdp2", 2), pytest.param("zero3", 2, marks=needs_deepspeed)]
)
def test_a_killed_process_ends_all_and_the_run_goes_on_bit_for_bit(
    train_in: Callable[..., Path], tmp_path: Path, strategy: str, count: int
) -> None:
    whole = train_in("whole", strategy, count, **RUN)
    with pytest.raises(ChildProcessError) as ended:
        train_in("out", strategy, count, kill_at=3, kill_rank=1, **RUN)
    others: list[tuple[int, str]] = ended.value.args[0]
    code, _ = others.pop(1)
    assert code == -9
    assert [code for code, _ in others] == [2] * (count - 1), f"they ended by themselves, within ten seconds: {others}"
    assert all(LOST in said for _, said in others)
    assert [each.step for each in checkpoints(tmp_path / "out")] == [2]
    assert [log.step for log in read_log(tmp_path / "out" / "trainer_log.jsonl")] == [1, 2, 3]
    again = train_in("out", strategy, count, **RUN)
    assert (again / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    losses = [[log.loss for log in read_log(out / "trainer_log.jsonl")] for out in (whole, again)]
    assert losses[0] == losses[1]
