"""When a run stops and when its adapter shrinks, as pure decisions; and that shrinking is the best of its rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from pingjia.models import family_of, load_model
from pingjia.tune.checkpoint import checkpoints
from pingjia.tune.journal import read_log
from pingjia.tune.loop import SHRUNK
from pingjia.tune.lora import add_adapter, resolve_targets
from pingjia.tune.penalty import l2_penalty, lora_matrices
from pingjia.tune.settings import TuneSettings
from pingjia.tune.shrink import best_of_rank, shrink_rank
from pingjia.tune.watch import Watch


def looks(*losses: float, train: tuple[float, ...] | None = None) -> Watch:
    watch = Watch()
    for step, loss in enumerate(losses, start=1):
        watch.look(step, loss, train[step - 1] if train else loss)
    return watch


def test_patience_counts_looks_since_the_best() -> None:
    assert not looks(3, 2, 2.5, 2.4).should_stop(3)
    assert looks(3, 2, 2.5, 2.4, 2.0).should_stop(3)  # equal is not better
    assert not looks(3, 2, 2.5, 2.4, 1.9).should_stop(3)
    assert not looks(*[5.0] * 50).should_stop(None)
    assert (looks(3, 2, 2.5).best_loss, looks(3, 2, 2.5).best_step) == (2, 2)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.integers(1, 5))
def test_it_stops_exactly_when_the_last_looks_were_no_better(losses: list[float], patience: int) -> None:
    best = losses.index(min(losses))
    assert looks(*losses).should_stop(patience) == (len(losses) - 1 - best >= patience)


def test_over_fitting_is_a_gap_that_opens_twice_while_nothing_gets_better() -> None:
    assert looks(2.0, 2.1, 2.2, train=(1.9, 1.5, 1.0)).is_overfitting()
    assert not looks(2.0, 1.9, 1.8, train=(1.9, 1.5, 1.0)).is_overfitting()  # it still gets better
    assert not looks(2.0, 2.1, 2.2, train=(1.0, 1.5, 1.9)).is_overfitting()  # the gap closes
    assert not looks(2.0, 2.1, train=(1.9, 1.0)).is_overfitting()  # too early to tell


def test_a_watch_survives_a_checkpoint() -> None:
    watch = looks(3, 2, 2.5, train=(2, 1, 0.5))
    assert Watch.of(json.loads(json.dumps(watch.to_dict()))) == watch


@given(st.integers(1, 6), st.integers(0, 10**6))
def test_no_matrix_of_that_rank_is_nearer(rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = torch.randn(8, 20, dtype=torch.double), torch.randn(12, 8, dtype=torch.double)
    new_a, new_b, lost, total = best_of_rank(a, b, rank)
    assert (new_a.shape, new_b.shape) == ((rank, 20), (12, rank))
    singular = torch.linalg.svdvals(b @ a)
    error = (new_b @ new_a - b @ a).square().sum().item()
    assert error == pytest.approx(singular[rank:].square().sum().item(), rel=1e-9, abs=1e-9)  # Eckart-Young
    assert lost == pytest.approx(error, rel=1e-9, abs=1e-9)
    assert total == pytest.approx((b @ a).square().sum().item())


@pytest.mark.parametrize("empty", ["A", "B"])
def test_an_adapter_that_has_not_learnt_yet_still_can(empty: str) -> None:
    """What is 0 stays 0 (B of a linear, A of an embedding), the other does not: both 0 would have no gradient again."""
    a, b = torch.randn(8, 20, dtype=torch.double), torch.randn(12, 8, dtype=torch.double)
    (a if empty == "A" else b).zero_()
    new_a, new_b, lost, total = best_of_rank(a, b, 3)
    assert (lost, total) == (0, 0)
    still, other = (new_a, new_b.T) if empty == "A" else (new_b, new_a)
    assert torch.count_nonzero(still) == 0
    before = b.norm(dim=0) if empty == "A" else a.norm(dim=1)
    torch.testing.assert_close(other.norm(dim=1), before.mean().expand(3))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_shrunk_adapter_computes_the_nearest_function(tiny_llama: Path, rslora: bool) -> None:
    settings = TuneSettings(
        output_dir="-", lora_rank=8, lora_dropout=0, lora_target="q_proj,embedding", use_rslora=rslora
    )
    model = load_model(tiny_llama)
    adapted = add_adapter(model, resolve_targets(model, family_of(model), settings), settings)
    low_rank(adapted, 3)
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        lost = shrink_rank(adapted, 3)
        after = adapted(input_ids=ids).logits
    assert lost < 1e-10  # it was of rank 3 all along
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert adapted.peft_config["default"].r == 3
    assert {p.shape[0] for n, p in adapted.named_parameters() if "lora_A." in n} == {3}


def low_rank(model: PeftModel, rank: int) -> None:
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data = torch.randn(p.shape[0], rank) @ torch.randn(rank, p.shape[1]) * 0.05


def test_the_gradient_of_the_penalty() -> None:
    torch.manual_seed(1)
    matrices = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5, 3))]
    value = l2_penalty(matrices, 0.01)
    value.backward()
    assert value.item() == pytest.approx(0.01 * sum((m**2).sum().item() for m in matrices), rel=1e-6)
    for matrix in matrices:
        torch.testing.assert_close(matrix.grad, 2 * 0.01 * matrix.detach())


def test_the_penalty_takes_adapters_only() -> None:
    def parameter(trained: bool = True) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.ones(2), requires_grad=trained)

    named = [("x.lora_A.default.weight", parameter()), ("x.lora_B.default.weight", parameter())]
    others = [("x.weight", parameter()), ("y.lora_A.default.weight", parameter(trained=False))]
    size = [("x.lora_magnitude_vector.default.weight", parameter())]
    assert lora_matrices(named + others + size) == [p for _, p in named]


def test_the_penalty_is_logged_apart_and_pulls_weights_down(tune: Callable, tmp_path: Path) -> None:
    plain = tune(output_dir=str(tmp_path / "plain"))
    tune(output_dir=str(tmp_path / "held"), lora_l2=0.01)
    logs = {name: read_log(tmp_path / name / "trainer_log.jsonl") for name in ("plain", "held")}
    assert all(log.l2 is None for log in logs["plain"])
    assert all(log.l2 is not None and log.l2 > 0 for log in logs["held"])
    assert logs["held"][0].loss == pytest.approx(logs["plain"][0].loss, rel=1e-6)  # B is zero: the same function
    assert logs["held"][-1].l2 < logs["held"][0].l2  # type: ignore[operator]
    assert plain.finished


def test_a_run_stops_early_with_its_best_weights(tune: Callable, tmp_path: Path, over_fitting: dict[str, Any]) -> None:
    result = tune(**over_fitting, early_stopping_patience=3, eval_steps=2)
    logs = read_log(tmp_path / "out" / "trainer_log.jsonl")
    held_out = {log.step: log.eval_loss for log in logs if log.eval_loss is not None}
    best = min(held_out, key=lambda step: held_out[step])
    assert len(logs) == best + 3 * 2 < 12 * 4
    assert (logs[-1].event or "").startswith("stopped early")
    assert result.eval_loss == held_out[best]
    saved = checkpoints(tmp_path / "out")[-1].path / "adapter_model.safetensors"
    best_file = tmp_path / "out" / f"best-{best:06d}" / "adapter_model.safetensors"
    assert saved.read_bytes() == best_file.read_bytes()
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == best_file.read_bytes()


def test_rank_shrinks_once_when_it_over_fits(tune: Callable, tmp_path: Path, over_fitting: dict[str, Any]) -> None:
    tune(**over_fitting, lora_rank=4, shrink_lora_rank_to=2, early_stopping_patience=4, eval_steps=2)
    logs = read_log(tmp_path / "out" / "trainer_log.jsonl")
    events = [log.event for log in logs if log.event]
    assert [event.startswith(SHRUNK) for event in events].count(True) == 1
    assert "rank 4 -> 2" in events[0]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 2
