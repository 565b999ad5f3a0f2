"""Progressive training: embedding, then attention, then FFN, into one adapter; what is closed does not move a byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pingjia.errors import TrainingError
from pingjia.tune import Hooks
from pingjia.tune.groups import module_of
from pingjia.tune.journal import read_log
from pingjia.tune.phases import Phase, enter, frozen_digest, require_untouched
from pingjia.tune.plan import TrainPlan

PHASES = [{"target": "embedding"}, {"target": "attention", "learning_rate": 2e-3}, {"target": "ffn", "max_steps": 3}]
GROUPS = {"embedding": ("embed_tokens",), "attention": ("q_proj", "o_proj"), "ffn": ("up_proj", "down_proj")}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Groups of GROUPS that have a tensor which changed."""
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    return {group for group, names in GROUPS.items() if any(f".{n}." in name for name in changed for n in names)}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("exclusive", [{"embedding"}, {"attention"}, {"ffn"}]),
        ("cumulative", [{"embedding"}, {"embedding", "attention"}, {"embedding", "attention", "ffn"}]),
    ],
)
def test_each_phase_moves_its_own_part(tune: Callable, tmp_path: Path, mode: str, expected: list[set[str]]) -> None:
    result = tune(phases=PHASES, phase_mode=mode, num_train_epochs=1, save_steps=1, save_total_limit=99)
    logs = read_log(tmp_path / "out" / "trainer_log.jsonl")
    assert [log.phase for log in logs] == ["embedding"] * 4 + ["attention"] * 4 + ["ffn"] * 3
    assert result.num_steps == 11
    states = {step: tensors(tmp_path / "out" / f"checkpoint-{step:06d}") for step in range(1, 12)}
    for (start, end), groups in zip([(1, 4), (4, 8), (8, 11)], expected, strict=True):
        assert moved(states[start], states[end]) == groups
    assert tensors(tmp_path / "out").keys() == states[1].keys()  # one adapter with all of it, from the beginning


def test_every_phase_has_its_own_rate_and_schedule(tune: Callable, tmp_path: Path) -> None:
    plans: list[TrainPlan] = []
    tune(phases=PHASES, num_train_epochs=1, warmup_ratio=0.0, lr_scheduler_type="linear", hooks=Hooks(plans.append))
    logs = read_log(tmp_path / "out" / "trainer_log.jsonl")
    assert [log.learning_rate for log in logs if log.phase == "attention"] == pytest.approx([2e-3, 1.5e-3, 1e-3, 5e-4])
    assert [log.learning_rate for log in logs if log.phase == "ffn"] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert [(row.phase, row.rate, row.num_steps) for row in plans[0].rates] == [
        ("embedding", 1e-3, 4),
        ("attention", 2e-3, 4),
        ("ffn", 1e-3, 3),
    ]


def test_phases_may_take_different_layers(tune: Callable, tmp_path: Path) -> None:
    phases = [{"target": "q_proj", "layers": "1"}, {"target": "q_proj,v_proj", "layers": "2-3"}]
    tune(phases=phases, max_steps=2)
    modules = {module_of(name) for name in tensors(tmp_path / "out")}
    assert len(modules) == 5
    assert not any("layers.0.self_attn.v_proj" in name for name in modules)


def test_early_stopping_ends_one_phase_not_the_run(
    tune: Callable, tmp_path: Path, over_fitting: dict[str, Any]
) -> None:
    phases = [{"target": "attention"}, {"target": "ffn"}]
    tune(**over_fitting, phases=phases, early_stopping_patience=1, eval_steps=1)
    logs = read_log(tmp_path / "out" / "trainer_log.jsonl")
    ends = [log.phase for log in logs if (log.event or "").startswith("stopped early")]
    assert ends == ["attention", "ffn"]


def test_a_phase_that_matches_nothing_stops_the_run(tune: Callable) -> None:
    with pytest.raises(TrainingError, match="'atention' matches no linear layer; did you mean attention"):
        tune(phases=[{"target": "atention"}])


def test_a_frozen_byte_that_changes_is_seen() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    phase = Phase(0, "second", frozenset({"1"}), 1e-3, None)  # type: ignore[arg-type]
    opened = enter(model, phase, frozenset(name for name, _ in model.named_parameters()))
    assert [name for name, _ in opened] == ["1.weight", "1.bias"]
    before = frozen_digest(model)
    model[1].weight.data += 1
    require_untouched(model, before, phase)
    model[0].bias.data[2] += 1e-6
    with pytest.raises(TrainingError, match="frozen have changed"):
        require_untouched(model, before, phase)
