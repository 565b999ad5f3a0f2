"""Order and rate of every update: pure functions of the step, so a resumed run finds its place."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.tune.batches import BatchPlan, longest_micro, share_out
from pingjia.tune.loop import max_micro_tokens
from pingjia.tune.schedule import rate_factor

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)

plans = st.builds(
    BatchPlan.of,
    st.integers(1, 60),
    rows_per_micro=st.integers(1, 9),
    micros_per_update=st.integers(1, 4),
    num_epochs=st.floats(0.1, 4),
    max_steps=st.none() | st.integers(1, 40),
    seed=st.integers(0, 2**31),
)


@EXAMPLES
@given(plans)
def test_every_row_once_an_epoch(plan: BatchPlan) -> None:
    seen = Counter()
    for step, micros in plan.updates():
        seen.update(row for micro in micros for row in micro)
        if (step + 1) % plan.updates_per_epoch == 0:
            epochs = (step + 1) // plan.updates_per_epoch
            assert seen == {row: epochs for row in range(plan.num_rows)}
    assert max(seen.values()) - min(seen.get(row, 0) for row in range(plan.num_rows)) <= 1


@EXAMPLES
@given(plans, st.data())
def test_going_on_gives_the_same_micro_batches(plan: BatchPlan, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, plan.num_steps))
    assert list(plan.updates(start)) == list(plan.updates())[start:]


@EXAMPLES
@given(plans)
def test_micro_batches_are_full_but_for_the_end_of_an_epoch(plan: BatchPlan) -> None:
    steps = [step for step, _ in plan.updates()]
    assert steps == list(range(plan.num_steps))
    for step, micros in plan.updates():
        assert all(micros)
        assert len(micros) <= plan.micros_per_update
        if (step + 1) % plan.updates_per_epoch:
            assert [len(m) for m in micros] == [plan.rows_per_micro] * plan.micros_per_update


@EXAMPLES
@given(plans)
def test_the_number_of_updates(plan: BatchPlan) -> None:
    assert plan.num_steps >= 1
    assert plan.updates_per_epoch == math.ceil(plan.num_rows / plan.rows_per_update)


def test_epochs_are_shuffled_differently_and_by_seed() -> None:
    plan = BatchPlan(100, 8, 1, 26, seed=1)
    other = BatchPlan(100, 8, 1, 26, seed=2)
    assert len({tuple(p.order(epoch)) for p in (plan, other) for epoch in range(3)}) == 6


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"), [(3.0, None, 9), (0.5, None, 2), (0.01, None, 1), (3.0, 5, 5), (0.5, 100, 100)]
)
def test_epochs_or_steps(epochs: float, max_steps: int | None, expected: int) -> None:
    plan = BatchPlan.of(
        12, rows_per_micro=2, micros_per_update=2, num_epochs=epochs, max_steps=max_steps, seed=0
    )  # three updates an epoch
    assert plan.num_steps == expected


kinds = st.sampled_from(["linear", "cosine", "constant"])


@EXAMPLES
@given(st.integers(1, 300), kinds, st.floats(0, 0.99))
def test_every_update_has_a_rate_and_none_exceeds_the_peak(num: int, kind: str, warmup: float) -> None:
    rates = [rate_factor(i, num, kind=kind, warmup_ratio=warmup) for i in range(num)]
    assert all(0 < rate <= 1 + 1e-12 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_known_rates() -> None:
    def rates(kind: str, warmup: float) -> list[float]:
        return [rate_factor(i, 4, kind=kind, warmup_ratio=warmup) for i in range(4)]

    assert rates("constant", 0) == [1, 1, 1, 1]
    assert rates("linear", 0) == [1, 0.75, 0.5, 0.25]
    assert rates("linear", 0.5) == pytest.approx([1 / 3, 2 / 3, 1, 0.5])
    assert rates("cosine", 0) == pytest.approx([1, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4])


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=40),
    size=st.integers(1, 12),
)
def test_shared_out_rows_are_all_there_and_in_order(lengths: list[int], size: int) -> None:
    rows = list(range(len(lengths)))[::-1]
    micros = share_out(rows, lengths, size)
    assert sorted(row for micro in micros for row in micro) == sorted(rows)
    assert len(micros) == -(-len(rows) // size)
    assert all(0 < len(micro) <= size for micro in micros)
    assert all(micro == sorted(micro, reverse=True) for micro in micros), "the order of the update"


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=40),
    size=st.integers(1, 12),
    most=st.integers(1, 2000),
    processes=st.integers(1, 3),
)
def test_so_many_micro_batches_that_tokens_are_few(lengths: list[int], size: int, most: int, processes: int) -> None:
    rows = list(range(len(lengths)))
    micros = share_out(rows, lengths, size, processes, most)
    assert sorted(row for micro in micros for row in micro) == rows
    assert len(micros) % processes == 0
    assert all(len(micro) <= size for micro in micros)
    tokens = [sum(lengths[row] for row in micro) for micro in micros]
    assert sum(tokens) / len(tokens) <= most or max(map(len, micros)) == 1, "as many as it takes, or a row each"
    fewest = share_out(rows, lengths, size, processes)
    assert len(micros) == len(fewest) or sum(lengths) / (len(micros) - processes) > most, "and no more"
    assert processes > 1 or all(micros)


def test_rows_are_parted_by_tokens_only_when_there_are_many() -> None:
    assert share_out(range(3), [300, 300, 400], 8, max_tokens=1000) == [[0, 1, 2]]
    assert share_out(range(3), [300, 300, 401], 8, max_tokens=1000) == [[2], [0, 1]]


@pytest.mark.parametrize(("device", "processes", "most"), [("cpu", 1, 1024), ("cpu", 2, None), ("meta", 1, None)])
def test_only_one_process_on_a_cpu_parts_by_tokens(device: str, processes: int, most: int | None) -> None:
    run: Any = SimpleNamespace(ranks=SimpleNamespace(size=processes), model=torch.nn.Module())
    run.model.device = torch.device(device)
    assert max_micro_tokens(run) == most


def test_one_micro_batch_is_the_update_as_it_is() -> None:
    assert share_out([4, 1, 3], [9] * 5, 3) == [[4, 1, 3]]


def test_long_rows_are_kept_apart() -> None:
    lengths = [100, 100, 1, 1, 100, 1, 1, 100]
    micros = share_out(range(8), lengths, 2)
    assert sorted(sum(lengths[row] for row in micro) for micro in micros) == [101, 101, 101, 101]


def test_the_longest_micro_batch_of_a_plan() -> None:
    plan = BatchPlan.of(10, rows_per_micro=2, micros_per_update=1, num_epochs=3, max_steps=None, seed=1)
    lengths = [1, 50, 2, 3, 4, 60, 5, 6, 7, 8]
    found = longest_micro(plan, lengths, 2)
    everything = [micro for _, micros in plan.updates() for micro in micros]
    assert sum(lengths[row] for row in found) == max(sum(lengths[row] for row in micro) for micro in everything)
    assert found in everything
    last = longest_micro(plan, lengths, 2, plan.num_steps - 1)
    assert last == everything[-1]
    assert longest_micro(plan, lengths, 2, plan.num_steps) == []
