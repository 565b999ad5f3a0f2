"""Several processes learn what one learns; each holds its share; a run that lost a process goes on."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from pingjia.data.settings import DataSettings
from pingjia.errors import TrainingError
from pingjia.models.settings import ModelSettings
from pingjia.tune import train
from pingjia.tune.batches import share_of_process
from pingjia.tune.distributed import messages_of
from pingjia.tune.journal import StepLog, read_log
from pingjia.tune.launch import Layout, free_port, launch
from pingjia.tune.settings import TuneSettings

PROCESS = Path(__file__).with_name("rank.py")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not HAS_DEEPSPEED, reason="DeepSpeed is needed: pip install 'pingjia[distributed]'"
)


@pytest.fixture(scope="session")
def job(tiny_llama: Path, rows_file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """7 rows, 4 an update (so the last update of an epoch has 3), 3 epochs, held-out rows, no dropout."""
    tune = {"lora_dropout": 0.0, "num_train_epochs": 3, "gradient_accumulation_steps": 2, "report_to": ["none"]}
    return {
        "model": {"model_name_or_path": str(tiny_llama), "device": "cpu"},
        "data": {"dataset": [str(rows_file)], "eval_dataset": [str(rows_file)]},
        "tune": settings | tune,
    }


def with_tune(job: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return job | {"tune": job["tune"] | changed}


def in_one_process(job: dict[str, Any], out: Path, **changed: Any) -> Path:
    tune = TuneSettings(output_dir=str(out), **(job["tune"] | changed))
    train(ModelSettings(**job["model"]), DataSettings(**job["data"]), tune)
    return out


def in_processes(job: dict[str, Any], out: Path, strategy: str, count: int, **more: Any) -> Path:
    distributed = {"strategy": strategy, "processes": count, "timeout_s": 240}
    job = with_tune(job, output_dir=str(out), distributed=distributed) | more
    launch([sys.executable, str(PROCESS), json.dumps(job)], Layout(count, 0, count, "127.0.0.1", free_port()))
    return out


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, job: dict[str, Any]) -> Path:
    return in_one_process(job, tmp_path_factory.mktemp("alone") / "out")


def logs(out: Path) -> list[StepLog]:
    return read_log(out / "trainer_log.jsonl")


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "adapter_model.safetensors")


def assert_same_run(out: Path, expected: Path) -> None:
    assert len(logs(out)) == len(logs(expected)) > 0
    for log, one in zip(logs(out), logs(expected), strict=True):
        assert (log.step, log.num_tokens, log.num_learnt) == (one.step, one.num_tokens, one.num_learnt)
        assert log.loss == pytest.approx(one.loss, abs=1e-5)
        assert log.eval_loss == pytest.approx(one.eval_loss, abs=1e-5)
        assert log.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    got, wanted = tensors(out), tensors(expected)
    assert got.keys() == wanted.keys()
    assert all(torch.allclose(got[name], wanted[name], atol=2e-5) for name in wanted)
    assert any(tensor.count_nonzero() for name, tensor in got.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("strategy", "count"), [("fsdp2", 2), ("fsdp2", 4), pytest.param("zero3", 4, marks=needs_deepspeed)]
)
def test_processes_learn_what_one_learns_and_hold_their_share(
    job: dict[str, Any], alone: Path, tmp_path: Path, strategy: str, count: int
) -> None:
    out = in_processes(job, tmp_path / "out", strategy, count, holdings=str(tmp_path / "holdings"))
    assert_same_run(out, alone)
    holdings = json.loads((tmp_path / "holdings").read_text())
    assert [rank for rank, _, _ in holdings] == list(range(count))
    whole = holdings[0][2]
    assert all(held < 1.02 * whole / count for _, held, _ in holdings)
    assert sum(held for _, held, _ in holdings) >= whole


@needs_deepspeed
def test_a_run_that_loses_a_process_says_so_and_goes_on(job: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    """Killed before update 5 of 6, with the checkpoint of update 4 on disk."""
    with pytest.raises(TrainingError, match=r"process 1 of 2 was ended by SIGKILL"):
        in_processes(job, tmp_path / "out", "zero3", 2, kill_at=4, kill_rank=1)
    assert [log.step for log in logs(tmp_path / "out")] == [1, 2, 3, 4]
    assert_same_run(in_processes(job, tmp_path / "out", "zero3", 2), alone)


def test_dropout_differs_between_processes_and_resumes_exactly(job: dict[str, Any], tmp_path: Path) -> None:
    job = with_tune(job, lora_dropout=0.3)
    whole = in_processes(job, tmp_path / "whole", "fsdp2", 2)
    with pytest.raises(TrainingError, match="SIGKILL"):
        in_processes(job, tmp_path / "out", "fsdp2", 2, kill_at=3, kill_rank=0)
    again = in_processes(job, tmp_path / "out", "fsdp2", 2)
    assert (again / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    state = torch.load(next(again.glob("checkpoint-*")) / "trainer_state.pt", weights_only=True)
    assert len(state["rng"]) == 2
    assert not torch.equal(state["rng"][0]["cpu"], state["rng"][1]["cpu"])


def test_everything_a_run_can_do_works_in_two_processes(
    job: dict[str, Any], tmp_path: Path, contradiction: Path
) -> None:
    """Phases, L2, a shrinking rank, best weights, checkpointed activations, packed base: as in one process."""
    job = job | {"data": job["data"] | {"eval_dataset": [str(contradiction)]}}
    job |= {"model": job["model"] | {"quantization_bit": 8}}
    job = with_tune(
        job,
        learning_rate=0.03,
        num_train_epochs=10,
        lora_l2=1e-6,
        phases=[{"target": "attention"}, {"target": "ffn", "max_steps": 4}],
        eval_steps=2,
        early_stopping_patience=3,
        shrink_lora_rank_to=2,
        gradient_checkpointing=True,
        memory="off",
    )
    one = in_one_process(job, tmp_path / "one")
    two = in_processes(job, tmp_path / "two", "fsdp2", 2)
    assert [log.event for log in logs(two) if log.event], "nothing happened"
    strip = [(log.step, log.phase, (log.event or "")[:12]) for log in logs(two)]
    assert strip == [(log.step, log.phase, (log.event or "")[:12]) for log in logs(one)]
    assert [log.loss for log in logs(two)] == pytest.approx([log.loss for log in logs(one)], rel=1e-3)
    assert tensors(two).keys() == tensors(one).keys()


def test_a_checkpoint_of_processes_is_one_of_a_single_process_too(
    job: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="SIGKILL"):
        in_processes(job, tmp_path / "out", "fsdp2", 2, kill_at=4, kill_rank=0)
    assert_same_run(in_one_process(job, tmp_path / "out"), alone)


def test_processes_share_the_rows_of_an_update_between_them() -> None:
    lengths = [30, 5, 9, 14, 7, 22, 3]
    for count in (1, 2, 3, 4):
        for rows in ([0, 3, 4, 6], [5], list(range(7))):
            parts = [share_of_process(rows, lengths, 2, rank, count) for rank in range(count)]
            assert len({len(part) for part in parts}) == 1, "every process must take part in every gathering"
            taught = [row for part in parts for micro, is_idle in part if not is_idle for row in micro]
            assert sorted(taught) == sorted(rows)
            assert all(0 < len(micro) <= 2 for part in parts for micro, _ in part)
            assert all(len(micro) == 1 for part in parts for micro, is_idle in part if is_idle)


@given(sizes=st.lists(st.integers(0, 9), max_size=6), room=st.integers(1, 7))
def test_messages_hold_every_number_once_in_order(sizes: list[int], room: int) -> None:
    flat = torch.arange(sum(sizes))
    messages = list(messages_of(flat.split(sizes) if sizes else [], room))
    assert [sum(piece.numel() for piece in pieces) for pieces in messages[:-1]] == [room] * (len(messages) - 1)
    assert all(pieces and all(piece.numel() for piece in pieces) for pieces in messages)
    assert torch.equal(torch.cat([piece for pieces in messages for piece in pieces] or [flat[:0]]), flat)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"strategy": "ddp"}, "needs its processes"),
        ({"strategy": "fsdp2"}, "needs its processes"),
        ({"strategy": "zero3"}, "needs its processes"),
    ],
)
def test_a_strategy_without_processes_is_refused(
    job: dict[str, Any], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        in_one_process(job, tmp_path / "out", distributed=changed)


def test_processes_without_a_strategy_are_refused(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun without distributed.strategy would train the same adapter several times over."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=r"started as 2 processes, but distributed\.strategy is none"):
        in_one_process(job, tmp_path / "out")


def test_what_processes_cannot_do_is_refused(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if HAS_DEEPSPEED:
        with pytest.raises(TrainingError, match=r"phases: DeepSpeed .*strategy=fsdp2"):
            in_one_process(job, tmp_path / "out", phases=[{"target": "ffn"}], distributed={"strategy": "zero3"})
        with pytest.raises(TrainingError, match=r"memory_limit_gb: DeepSpeed .*nor an update be broken off"):
            in_one_process(job, tmp_path / "out", memory_limit_gb=4, distributed={"strategy": "zero3"})
