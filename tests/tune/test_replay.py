"""Old rows between new ones: every new row once an epoch, old ones in turn, evenly spread."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.errors import TrainingError
from pingjia.tune import TrainResult
from pingjia.tune.batches import BatchPlan
from pingjia.tune.replay import ReplayPlan, num_replayed


def plan_of(num_new: int, num_old: int, replayed: int, seed: int = 3, rows: int = 4) -> ReplayPlan:
    return ReplayPlan(num_new + replayed, rows, 1, 100, seed, 0, num_new, num_old)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(0, 5), st.integers(0, 9))
def test_an_epoch_has_every_new_row_once_and_old_ones_in_turn(
    num_new: int, num_old: int, replayed: int, epoch: int, seed: int
) -> None:
    plan = plan_of(num_new, num_old, replayed, seed)
    orders = [plan.order(e) for e in range(epoch + 1)]
    for order in orders:
        assert sorted(row for row in order if row < num_new) == list(range(num_new))
        assert len(order) == num_new + replayed
    seen = Counter({row: 0 for row in range(num_new, num_new + num_old)})
    seen.update(row for order in orders for row in order if row >= num_new)
    assert len(seen) == num_old
    assert max(seen.values()) - min(seen.values()) <= 1  # none is seen again before all have been
    assert plan.order(epoch) == orders[-1]


@given(st.integers(1, 60), st.integers(1, 60))
def test_every_stretch_has_its_share(num_new: int, replayed: int) -> None:
    order = plan_of(num_new, 50, replayed).order(0)
    for stop in range(1, len(order) + 1):
        expected = stop * replayed / len(order)
        assert abs(sum(row >= num_new for row in order[:stop]) - expected) <= 1


def test_new_rows_come_in_the_order_they_would_have_alone() -> None:
    alone = BatchPlan(9, 4, 1, 100, 3, 0)
    mixed = plan_of(9, 20, 5)
    for epoch in range(3):
        assert [row for row in mixed.order(epoch) if row < 9] == alone.order(epoch)


@pytest.mark.parametrize(
    ("num_new", "num_old", "ratio", "expected"), [(10, 5, 0.5, 5), (10, 0, 0.5, 0), (10, 5, 0.0, 0), (3, 9, 0.1, 1)]
)
def test_how_many(num_new: int, num_old: int, ratio: float, expected: int) -> None:
    assert num_replayed(num_new, num_old, ratio) == expected


def test_replayed_rows_are_learnt_and_questions_of_probes_never(
    tune: Callable[..., TrainResult], tmp_path: Path, rows_file: Path
) -> None:
    """The earlier task's rows: two of the seven are asked in probes."""
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    probe, new = tmp_path / "probe.jsonl", tmp_path / "new.jsonl"
    asked = [{**rows[0], "response": "reworded"}, rows[3]]
    probe.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked), encoding="utf-8")
    new.write_text('{"prompt": "A?", "response": "B."}\n{"prompt": "C?", "response": "D."}\n', encoding="utf-8")
    tune(output_dir=str(tmp_path / "first"))
    seen: dict[str, Any] = {}
    from pingjia.tune import run as running

    real = running.run_training

    def watch(run: Any) -> bool:
        seen["where"] = [row.where for row in run.rows]
        seen["orders"] = [run.phases[0].plan.order(epoch) for epoch in range(3)]
        return real(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "run_training", watch)
        continual = {"replay_ratio": 1.0, "probes": {"first": str(probe)}, "min_retention": 0.0}
        go_on = {"dataset": new, "continue_from": str(tmp_path / "first")}
        result = tune(**go_on, num_train_epochs=3, continual=continual)
    replayed = [where for where in seen["where"] if where.startswith(str(rows_file))]
    assert sorted(int(where.rpartition(":")[2]) for where in replayed) == [2, 3, 5, 6, 7]
    assert [sum(row >= 2 for row in order) for order in seen["orders"]] == [2, 2, 2]
    assert len({row for order in seen["orders"] for row in order if row >= 2}) == 5
    assert result.num_steps == 6  # 3 epochs of 2 new and 2 old rows, 2 an update
    every = [{**row, "response": "reworded"} for row in rows]
    probe.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in every), encoding="utf-8")
    with pytest.raises(TrainingError, match="0 of 7 earlier rows can be used"):
        tune(**go_on, continual=continual, output_dir=str(tmp_path / "none"))
