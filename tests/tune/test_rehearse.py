"""A rehearsal foretells the run it is of: the very tokens, a pace without strays; and a run in small leaves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pingjia.data.settings import DataSettings
from pingjia.errors import TrainingError
from pingjia.models.settings import ModelSettings
from pingjia.tune import rehearse as rehearsal
from pingjia.tune import train
from pingjia.tune.ladder import Rung
from pingjia.tune.loop import Trial
from pingjia.tune.rehearse import rehearse, short_run, tokens_per_s
from pingjia.tune.run import read_about
from pingjia.tune.settings import TuneSettings
from pingjia.tune.step import StepResult


def result(num_tokens: int, seconds: float) -> StepResult:
    return StepResult(loss=1.0, l2=0.0, grad_norm=1.0, num_tokens=num_tokens, num_learnt=1, seconds=seconds)


def trial(*typical: StepResult) -> Trial:
    return Trial(result(1000, 1.0), Rung(2, False), None, typical)


def test_the_pace_is_that_of_the_typical_updates() -> None:
    assert tokens_per_s(trial()) == 1000
    assert tokens_per_s(trial(result(100, 1.0), result(300, 1.0))) == 200


def test_an_update_that_something_held_up_is_left_out() -> None:
    assert tokens_per_s(trial(result(100, 1.0), result(100, 1.0), result(100, 9.0))) == 100


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"max_steps": 3},
        {"gradient_accumulation_steps": 2},
        {"phases": [{"target": "attention"}, {"target": "ffn", "max_steps": 2}], "lora_target": []},
    ],
    ids=lambda changed: ", ".join(changed) or "plain",
)
def test_it_foretells_the_tokens_of_the_run(
    tiny_llama: Path, rows_file: Path, settings: dict[str, Any], tmp_path: Path, changed: dict[str, Any]
) -> None:
    model, data = ModelSettings(model_name_or_path=str(tiny_llama), device="cpu"), DataSettings(dataset=str(rows_file))
    chosen = TuneSettings(output_dir=str(tmp_path / "out"), **(settings | changed))
    found = rehearse(model, data, chosen)
    run = train(model, data, chosen)
    assert found.num_steps == run.num_steps
    assert round(found.seconds_estimated * found.tokens_per_s) == run.trained_tokens


def test_a_rate_of_nothing_is_refused(
    tiny_llama: Path, rows_file: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    model, data = ModelSettings(model_name_or_path=str(tiny_llama), device="cpu"), DataSettings(dataset=str(rows_file))
    with pytest.raises(TrainingError, match="no weight would move; give a rate"):
        rehearse(model, data, TuneSettings(output_dir=str(tmp_path), **(settings | {"learning_rate": 0.0})))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_in_small_is_a_finished_run_and_is_gone_afterwards(
    tiny_llama: Path, rows_file: Path, settings: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    model, data = ModelSettings(model_name_or_path=str(tiny_llama), device="cpu"), DataSettings(dataset=str(rows_file))
    own = settings if kind == "lora" else {k: v for k, v in settings.items() if not k.startswith("lora")}
    chosen = TuneSettings(output_dir=str(tmp_path / "out"), finetuning_type=kind, **(own | {"learning_rate": 1e-5}))
    with short_run(model, data, chosen) as folder:
        about = read_about(folder)
        assert about is not None
        assert about["metrics"]["num_steps"] == 2
        assert about["recipe"]["learning_rate"] == rehearsal.SHORT_RATE
    assert not folder.exists()
    assert not (tmp_path / "out").exists()
