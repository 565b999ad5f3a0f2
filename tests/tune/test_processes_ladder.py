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
from pingjia.tune.launch import LOST
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


def test_the_whole_ladder_of_one_process_is_that_of_two(train_in: Run) -> None:
    """Six falls: halved twice, checkpointed, bfloat16, INT8, INT4; the same falls in one process give the same curve,
    and a run that was killed afterwards goes on upon its rung, bit for bit."""
    run = RUN | {"max_steps": 6, "save_steps": 2}
    one = train_in("one", out_of_memory={"rank": 0, "at": {"2": 6}}, **run)
    two = train_in("two", "ddp", 2, out_of_memory={"rank": 1, "at": {"2": 6}}, **run)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    for name in ("bfloat16 base", "INT8 base", "INT4 base"):
        assert f": {name}" in events(two)[3]
    killed = {"kill_at": 10, "kill_rank": 1}  # attempts count: in the fifth update
    with pytest.raises(ChildProcessError):
        train_in("out", "ddp", 2, out_of_memory={"rank": 0, "at": {"2": 6}}, **killed, **run)
    again = train_in("out", "ddp", 2, **run)
    assert adapter(again) == adapter(two)


def test_frozen_layers_are_kept_in_every_process(train_in: Run, tmp_path: Path) -> None:
    """Kept or computed anew: the same bits; with memory running out or not, the same losses as in one process."""
    run = RUN | {"max_steps": 8, "lora_layers": "3"}
    one = train_in("one", **run)
    oom, kept_file = {"rank": 1, "at": {"3": 1}}, tmp_path / "kept_bytes"
    kept = train_in("kept", "ddp", 2, out_of_memory=oom, kept_file=str(kept_file), **run)
    anew = train_in("anew", "ddp", 2, out_of_memory=oom, activation_cache_gb=0, **run)
    assert adapter(kept) == adapter(anew)
    assert int(kept_file.read_text()) > 0
    assert losses(kept) == pytest.approx(losses(one), abs=1e-5)
    assert list(events(kept)) == [4]


def test_what_is_in_pieces_cannot_be_packed(train_in: Run) -> None:
    """FSDP2 has the first rungs; the others are refused with the reason, and what was learnt is saved."""
    with pytest.raises(ChildProcessError) as ended:
        train_in("out", "fsdp2", 2, out_of_memory={"rank": 1, "at": {"3": 4}}, **(RUN | {"max_steps": 6}))
    assert [code for code, _ in ended.value.args[0]] == [2, 2]
    said = ended.value.args[0][0][1]
    assert "out of memory (process 1: injected after update 3), and nothing is left to use less of it" in said
    assert "INT4 base: the base is shared out in pieces already; load it so: quantization_bit=8 or 4" in said


def test_out_of_memory_where_the_others_wait_ends_all(train_in: Run) -> None:
    """In the backward pass of FSDP2 layers are gathered: a process that fails there cannot be waited for."""
    oom = {"rank": 1, "at": {"3": 1}, "in": "backward"}
    with pytest.raises(ChildProcessError) as ended:
        train_in("out", "fsdp2", 2, out_of_memory=oom, **(RUN | {"max_steps": 6}))
    (first, lost), (second, said) = ended.value.args[0]
    assert (first, second) == (2, 2)
    assert "where the other processes wait for this one" in said
    assert "set gradient_checkpointing=true" in said
    assert LOST in lost


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_limit_holds_for_every_process(train_in: Run, strategy: str) -> None:
    """One that no process can keep: all rungs are tried, and the end is told."""
    with pytest.raises(ChildProcessError) as ended:
        train_in("out", strategy, 2, memory_limit_gb=0.01, **(RUN | {"max_steps": 2}))
    for code, said in ended.value.args[0]:
        assert code == 2
        assert "of the 0.01 it may use), and nothing is left" in said
