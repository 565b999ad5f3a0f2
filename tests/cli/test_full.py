"""The whole road with a model that is trained itself, and what the other verbs make of its directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pingjia.models import load_model

Pingjia = Callable[..., Any]
FULL: dict[str, Any] = {"finetuning_type": "full", "lora_rank": None, "lora_target": None}


def went_well(outcome: Any) -> str:
    assert outcome.code == 0, outcome.out + outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    return outcome.out


def test_the_whole_road_and_then_again(pingjia: Pingjia, recipe: Callable[..., Path], tmp_path: Path) -> None:
    file, out = recipe(**FULL), tmp_path / "out"
    said = went_well(pingjia("run", file))
    assert "full: weights of 30 modules (all): 3,238,336 trainable of 3,238,336 parameters (100.00 %)" in said
    assert "rouge_l" in said
    assert f"pingjia serve {out} --served-model-name tuned" in said
    assert "(4 tokens in" in said
    assert f"pingjia chat {out}" in said
    before, after = (json.loads((out / "eval" / f"{name}.json").read_text()) for name in ("before", "after"))
    assert before != after
    again = went_well(pingjia("run", file))
    assert "not trained again" in again
    assert "not asked again" in again


def test_freeze_on_the_command_line(pingjia: Pingjia, recipe: Callable[..., Path]) -> None:
    file = recipe(**FULL | {"finetuning_type": "freeze"}, eval=None)
    said = went_well(pingjia("train", file, "freeze_trainable_layers=1"))
    assert "freeze: all but 9 modules" in said


def test_keys_of_an_adapter_are_refused_by_name(pingjia: Pingjia, recipe: Callable[..., Path]) -> None:
    done = pingjia("train", recipe(), "finetuning_type=full")
    assert done.code == 2
    assert "lora_rank, lora_target: only with finetuning_type=lora" in done.err
    assert "leave them out" in done.err


@pytest.fixture
def trained(pingjia: Pingjia, recipe: Callable[..., Path], tmp_path: Path) -> Path:
    went_well(pingjia("train", recipe(**FULL, eval=None)))
    return tmp_path / "out"


@pytest.mark.parametrize(("dtype", "stored"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_export_copies_the_model_in_another_format(
    pingjia: Pingjia, trained: Path, tmp_path: Path, dtype: str, stored: torch.dtype
) -> None:
    copy = tmp_path / "copy"
    done = pingjia("export", trained, "--out", copy, "--dtype", dtype, "--json")
    report = json.loads(went_well(done))
    assert report["max_logit_diff"] <= report["tolerance"]
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {stored}
    assert not list(copy.glob("checkpoint-*"))
    assert load_model(copy).dtype == torch.float32
    assert "nothing is overwritten" in pingjia("export", trained, "--out", copy).err


def test_a_model_is_not_an_adapter(pingjia: Pingjia, trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    done = pingjia("export", trained, "--out", tmp_path / "copy", "--base", tiny_llama)
    assert done.code == 2
    assert "needs no base" in done.err


def test_doctor_rehearses_it(pingjia: Pingjia, recipe: Callable[..., Path]) -> None:
    done = pingjia("doctor", recipe(**FULL), "--json")
    findings = {found["name"]: found for found in json.loads(done.out)}
    assert "planned" in findings["training"]["detail"]
    assert "saved and read back bit by bit" in findings["training"]["detail"]


def test_chat_with_the_directory(pingjia: Pingjia, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    went_well(pingjia("chat", trained, "--max-tokens", 3))
