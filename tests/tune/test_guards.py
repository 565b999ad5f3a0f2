"""Runs that would only look like training are stopped, and say why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError

from pingjia.errors import DataError, ModelError, TrainingError
from pingjia.models import family_of, load_model
from pingjia.tune import Hooks
from pingjia.tune.checkpoint import checkpoints, write_adapter
from pingjia.tune.guards import MovedCheck, require_nonzero_adapter
from pingjia.tune.lora import add_adapter, resolve_targets
from pingjia.tune.rehearse import rehearse
from pingjia.tune.settings import TuneSettings


def no_adapter(directory: Path) -> bool:
    return not (directory / "adapter_model.safetensors").exists() and not (directory / "pingjia.json").exists()


def test_learning_rate_zero_is_stopped_within_five_updates(tune: Callable, tmp_path: Path) -> None:
    steps: list[int] = []
    with pytest.raises(
        TrainingError, match=r"42 of 42 adapter tensors have not moved after 5 updates .*learning_rate 0"
    ):
        tune(learning_rate=0.0, save_steps=100, hooks=Hooks(on_step=lambda log: steps.append(log.step)))
    assert len(steps) <= 5
    assert no_adapter(tmp_path / "out")


@pytest.mark.parametrize("max_steps", [1, 2, 4])
def test_learning_rate_zero_in_a_run_too_short_for_that_is_stopped_too(
    tune: Callable, tmp_path: Path, max_steps: int
) -> None:
    with pytest.raises(TrainingError, match=r"have not moved|equals the base model"):
        tune(learning_rate=0.0, max_steps=max_steps)
    assert no_adapter(tmp_path / "out")


def test_one_tensor_that_does_not_move_is_named(tiny_llama: Path) -> None:
    settings = TuneSettings(output_dir="-", lora_target="q_proj")
    model = load_model(tiny_llama)
    adapted = add_adapter(model, resolve_targets(model, family_of(model), settings), settings)
    check = MovedCheck(adapted)
    trained = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
    for _, parameter in trained[1:]:
        parameter.data += 1
    with pytest.raises(TrainingError, match=f"1 of 6 adapter tensors .*{trained[0][0]}"):
        check(adapted)
    trained[0][1].data += 1
    check(adapted)


def test_nothing_trainable(tiny_llama: Path) -> None:
    with pytest.raises(TrainingError, match="no parameter is trainable"):
        MovedCheck(load_model(tiny_llama).requires_grad_(False))


def test_a_loss_that_is_no_number_stops_the_run(
    tune: Callable, tmp_path: Path, make_llama: Callable[..., Path]
) -> None:
    poisoned = make_llama(3)
    tensors = safetensors.torch.load_file(poisoned / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, poisoned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="loss is nan: training has diverged"):
        tune(model=poisoned)
    assert no_adapter(tmp_path / "out")
    assert checkpoints(tmp_path / "out") == []


def test_an_adapter_that_changes_nothing_is_not_saved(tiny_llama: Path, tmp_path: Path) -> None:
    settings = TuneSettings(output_dir="-", lora_target="q_proj")
    model = load_model(tiny_llama)
    adapted = add_adapter(model, resolve_targets(model, family_of(model), settings), settings)
    with pytest.raises(TrainingError, match="all 3 lora_B matrices are zero: this adapter equals the base model"):
        write_adapter(tmp_path, adapted)
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_any_b_is_refused() -> None:
    with pytest.raises(TrainingError, match="all 0 lora_B"):
        require_nonzero_adapter({"x.lora_A.weight": torch.ones(2)})
    require_nonzero_adapter({"x.lora_B.weight": torch.zeros(2), "y.lora_B.weight": torch.ones(2)})


def test_a_row_that_is_too_long_is_dropped_and_named(tune: Callable, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "hi", "response": "hello"}, {"prompt": "hi", "response": "long " * 200}] * 2
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plans: list[Any] = []
    tune(dataset=file, data={"cutoff_len": 100}, hooks=Hooks(on_plan=plans.append))
    assert plans[0].num_rows == 2
    assert plans[0].longest <= 100
    assert [d.split(": ")[0] for d in plans[0].dropped] == [f"{file}:2", f"{file}:4"]
    assert all("100" in d for d in plans[0].dropped)


def test_the_networks_own_limit_holds_too(tune: Callable, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "hi", "response": "hello"}, {"prompt": "hi", "response": "long " * 600}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plans: list[Any] = []
    tune(dataset=file, data={"cutoff_len": 4096}, hooks=Hooks(on_plan=plans.append))
    assert "512" in plans[0].dropped[0]


def test_nothing_left_to_learn(tune: Callable, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "hi", "response": "long " * 200}) + "\n", encoding="utf-8")
    with pytest.raises((DataError, TrainingError), match="100"):
        tune(dataset=file, data={"cutoff_len": 100})
    assert no_adapter(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file(tune: Callable, tmp_path: Path, text: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises((DataError, TrainingError)):
        tune(dataset=file)


def test_no_row_of_the_domain(tune: Callable) -> None:
    with pytest.raises((DataError, TrainingError)):
        tune(data={"domains": ["nothing"]})


def test_bad_rows_stop_the_run_by_file_and_line(tune: Callable, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = ['{"prompt": "hi", "response": "x"}', '{"prompt": "hi", "response": ""}'] + ["{broken"] * 12
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        tune(dataset=file)
    message = str(caught.value).splitlines()
    assert message[0].startswith(f"{file}:2: response:")
    assert message[1].startswith(f"{file}:3:")
    assert message[10] == "... and 3 more"
    assert message[11].startswith("13 rows cannot be trained on")


def test_a_target_that_matches_nothing_stops_before_anything_is_written(tune: Callable, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="matches no linear"):
        tune(lora_target="query_key_value")
    assert no_adapter(tmp_path / "out")


def test_a_family_that_is_not_supported(tune: Callable, make_llama: Callable[..., Path]) -> None:
    directory = make_llama(4)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="gpt2"):
        tune(model=directory)


@pytest.mark.parametrize(
    "bad",
    [
        {"lora_rank": 0},
        {"lora_dropout": 1.0},
        {"learning_rate": -1},
        {"num_train_epochs": 0},
        {"finetuning_type": "fully"},
        {"warmup_ratio": 1.0},
        {"save_total_limit": 0},
        {"learning_rates": 1},
        {"lr_scheduler_type": "cosin"},
        {"max_steps": 0},
    ],
)
def test_values_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TuneSettings(output_dir="-", **bad)


def test_a_rehearsal_raises_what_the_run_would_and_leaves_nothing(
    tiny_llama: Path, rows_file: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    from pingjia.data.settings import DataSettings
    from pingjia.models.settings import ModelSettings

    model, data = ModelSettings(model_name_or_path=str(tiny_llama), device="cpu"), DataSettings(dataset=str(rows_file))
    found = rehearse(model, data, TuneSettings(output_dir=str(tmp_path / "out"), **settings))
    assert (found.num_rows, found.num_dropped, found.num_steps) == (7, 0, 8)
    assert found.seconds_estimated > 0
    assert not (tmp_path / "out").exists()
    with pytest.raises(TrainingError, match="matches no linear"):
        rehearse(model, data, TuneSettings(output_dir="-", **(settings | {"lora_target": "nothing"})))
    with pytest.raises((DataError, TrainingError)):
        rehearse(model, DataSettings(dataset=str(rows_file), cutoff_len=8), TuneSettings(output_dir="-", **settings))
