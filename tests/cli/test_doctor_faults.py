"""Planted faults: doctor names each one with what it is about, and says what to do. One fault, one bad finding."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pingjia.cli import doctor, machine
from pingjia.cli.doctor_hardware import NEEDS, outdated, standings
from tests.cli.conftest import ROWS, Pingjia

Recipe = Callable[..., Path]
GIB = 2**30


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measure_read_bandwidth", lambda *args, **kwargs: 10.0)


@pytest.fixture(scope="module")
def sound() -> machine.Machine:
    """A machine on which nothing is wrong."""
    here = machine.describe()
    gpu = machine.Gpu("nvidia", "A10", 24 * GIB, 24 * GIB, "550.1", "8.6")
    return replace(
        here,
        cpu_instruction_sets=("avx2",),
        usable_cores=16,
        memory_bytes=64 * GIB,
        memory_available_bytes=60 * GIB,
        disk_free_bytes=900 * GIB,
        gpus=(gpu,),
        compiler="g++ 12",
        packages={**here.packages, "torch": "2.13.0"},
    )


def findings_of(pingjia: Pingjia, *words: Any) -> list[dict[str, str]]:
    outcome = pingjia("doctor", *words, "--json")
    assert outcome.code in (0, 2), outcome.err
    found: list[dict[str, str]] = json.loads(outcome.out)
    return found


def only_fault(findings: list[dict[str, str]], state: str = "bad") -> dict[str, str]:
    named = [f for f in findings if f["state"] == state and not f["name"].startswith("plan: ")]
    assert len(named) == 1, named
    assert named[0]["fix"]
    return named[0]


# ---- of the machine

MACHINES: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    "no torch": ({"packages": {"torch": None}}, "bad", "packages", "missing: torch", "pip install 'pingjia[model]'"),
    "an old peft": ({"packages": {"peft": "0.1.0"}}, "bad", "packages", "too old: peft 0.1.0", "pip install --upgrade"),
    "little memory": ({"memory_available_bytes": 2e9}, "bad", "memory", "2.00 GB available", "close other programs"),
    "a full disk": ({"disk_free_bytes": 10**9}, "bad", "disk", "1.00 GB free", "make room: at least 5.00 GB"),
    "torch without the GPU": ({"packages": {"torch": "2.13.0+cpu"}}, "bad", "accelerator", "A10", "torch for the GPU"),
    "a GPU without driver": ({"driver": None}, "note", "accelerator", "driver unknown", "install the vendor's driver"),
    "no compiler": ({"compiler": None}, "note", "compiler", "none found", "apt-get install g++"),
}


@pytest.mark.parametrize("fault", MACHINES)
def test_a_fault_of_the_machine(
    pingjia: Pingjia, sound: machine.Machine, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    changed, state, name, detail, fix = MACHINES[fault]
    monkeypatch.setattr(machine, "describe", lambda *args: broken(sound, changed))
    found = only_fault(findings_of(pingjia), state)
    assert found["name"] == name
    assert detail in found["detail"]
    assert fix in found["fix"]


def broken(sound: machine.Machine, changed: dict[str, Any]) -> machine.Machine:
    if "packages" in changed:
        return replace(sound, packages={**sound.packages, **changed["packages"]})
    if "driver" in changed:
        return replace(sound, gpus=(replace(sound.gpus[0], driver=None),))
    return replace(sound, **changed)


def test_a_sound_machine_has_no_fault(
    pingjia: Pingjia, sound: machine.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "describe", lambda *args: sound)
    assert not [f for f in findings_of(pingjia) if f["state"] == "bad"]


def test_the_machine_beside_the_plans_two(sound: machine.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(sound, gpus=(), usable_cores=2, memory_bytes=16 * GIB, disk_path="/proc/nowhere")
    small = replace(small, disk_free_bytes=20 * 10**9)
    found = {standing.need.name: standing for standing in standings(small)}
    assert not any(standing.is_enough for standing in found.values())
    assert found["cores"].detail == "2; for ChatGLM-6B at least 8, recommended 16"
    assert found["disk"].detail == "20 GB; for ChatGLM-6B at least 500 GB, recommended 1000 GB"
    assert [need.least for need in NEEDS] == [24, 8, 32, 500]
    assert [standing.is_enough for standing in standings(sound)][:3] == [True] * 3


def test_versions_are_compared_by_their_numbers() -> None:
    needs = ["torch>=2.10", "peft[x] (>=0.21)", 'redis>=5 ; extra == "redis"', "rich"]
    assert outdated({"torch": "2.9.1+cpu", "peft": "0.21.2", "redis": None}, needs) == [
        "torch 2.9.1+cpu (needs 2.10 or newer)"
    ]
    assert outdated({"torch": "2.13.0+cpu", "redis": "4.9"}, needs) == ["redis 4.9 (needs 5 or newer)"]


# ---- of the recipe, its data, its model

Plant = Callable[[Path, Path], dict[str, Any]]
"""plant(tmp_path, tiny_llama): what it changes in the recipe."""


def copied(tmp_path: Path, model: Path) -> Path:
    shutil.copytree(model, tmp_path / "model")
    return tmp_path / "model"


def cut_short(tmp_path: Path, model: Path) -> dict[str, Any]:
    weights = copied(tmp_path, model) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return {"model_name_or_path": str(tmp_path / "model")}


def without(pattern: str) -> Plant:
    def plant(tmp_path: Path, model: Path) -> dict[str, Any]:
        for file in copied(tmp_path, model).glob(pattern):
            file.unlink()
        return {"model_name_or_path": str(tmp_path / "model")}

    return plant


def not_a_number(tmp_path: Path, model: Path) -> dict[str, Any]:
    file = copied(tmp_path, model) / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in sorted(tensors) if "q_proj" in name)
    tensors[name][0, 0] = torch.nan
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return {"model_name_or_path": str(tmp_path / "model")}


def rows(*lines: str) -> Plant:
    def plant(tmp_path: Path, model: Path) -> dict[str, Any]:
        (tmp_path / "bad.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return {"dataset": str(tmp_path / "bad.jsonl")}

    return plant


def given(**changed: Any) -> Plant:
    return lambda tmp_path, model: changed


def out_is_a_file(tmp_path: Path, model: Path) -> dict[str, Any]:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    return {}


def out_is_the_model(tmp_path: Path, model: Path) -> dict[str, Any]:
    folder = copied(tmp_path, model)
    return {"model_name_or_path": str(folder), "output_dir": str(folder)}


GOOD_ROW = json.dumps(ROWS[0], ensure_ascii=False)
RECIPES: dict[str, tuple[Plant, str, str, str]] = {  # the fault, the finding, words of its cause, words of the remedy
    "a misspelt key": (given(lora_rnak=3), "recipe", "lora_rnak", "did you mean lora_rank?"),
    "a key for another way": (given(finetuning_type="full"), "recipe", "lora_rank", "leave them out"),
    "an output_dir that is a file": (out_is_a_file, "output", "is a file", "choose another output_dir"),
    "an output_dir that is the model": (out_is_the_model, "output", "is the model", "choose another output_dir"),
    "no such model": (given(model_name_or_path="/nowhere"), "data", "no such model directory", "/nowhere"),
    "no tokenizer": (without("tokenizer*"), "data", "tokenizer", "model"),
    "no such rows": (given(dataset="nowhere.jsonl"), "data", "nowhere.jsonl", "pingjia data check"),
    "a broken line": (rows(GOOD_ROW, '{"prompt": "a",'), "data", "bad.jsonl:2: json", "pingjia data prepare"),
    "an empty answer": (rows(GOOD_ROW, '{"prompt": "a", "response": ""}'), "data", "2: response", "data prepare"),
    "rows that are too long": (given(cutoff_len=16), "data", "length: 59 tokens", "cutoff_len"),
    "a module that is not there": (given(lora_target="q_porj"), "training", "q_porj", "did you mean q_proj?"),
    "a rate of nothing": (given(learning_rate=0.0), "training", "no weight would move", "learning_rate"),
    "weights cut short": (cut_short, "training", "cannot be loaded", "the message names"),
    "no weights": (without("*.safetensors"), "training", "model", "the message names"),
    "a weight that is no number": (not_a_number, "training", "nan", "the message names"),
    "a device that is not there": (given(device="cuda"), "training", "cuda", "device"),
    "too little memory allowed": (given(memory_limit_gb=0.01), "training", "memory", "memory_limit_gb"),
}


@pytest.mark.parametrize("fault", RECIPES)
def test_a_fault_of_the_recipe(
    pingjia: Pingjia, recipe: Recipe, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(doctor, "_machine", lambda: iter(()))
    plant, name, cause, remedy = RECIPES[fault]
    changed = plant(tmp_path, tiny_llama)
    findings = findings_of(pingjia, recipe(**changed))
    found = only_fault(findings)
    assert findings[-1] is found, "the checks after a fault are not made"
    said = f"{found['detail']} {found['fix']}"
    assert found["name"] == name, said
    assert cause.lower() in said.lower()
    assert remedy in said


def test_a_missing_recipe(pingjia: Pingjia, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_machine", lambda: iter(()))
    assert "no such recipe" in only_fault(findings_of(pingjia, "nowhere.yaml"))["detail"]


def test_a_template_that_changes_between_two_loads(
    pingjia: Pingjia, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pingjia import chat

    monkeypatch.setattr(doctor, "_machine", lambda: iter(()))
    true = chat.golden_chats

    def other(tokenizer: Any, **wishes: Any) -> Any:
        return [{**golden, "ids": [*golden["ids"], 1]} for golden in true(tokenizer, **wishes)]

    monkeypatch.setattr(chat, "golden_chats", other)
    found = only_fault(findings_of(pingjia, recipe()))
    assert found["name"] == "train-serve identity"
    assert "serve with the tokenizer files of the training" in found["fix"]


@pytest.fixture
def road_without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from pingjia.cli.doctor_road import Road

    monkeypatch.setattr(doctor, "_machine", lambda: iter(()))
    for name in ("_training", "_short_run", "_merge", "_quantise", "_answer"):
        monkeypatch.setattr(Road, name, lambda self: "left out")


@pytest.mark.usefixtures("road_without_training")
def test_a_port_that_is_taken(pingjia: Pingjia, recipe: Recipe) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = only_fault(findings_of(pingjia, recipe(serve={"port": taken.getsockname()[1]})))
        assert found["name"] == "port"
        assert str(taken.getsockname()[1]) in found["detail"]
        assert "set serve.host and serve.port" in found["fix"]


@pytest.mark.usefixtures("road_without_training")
def test_listening_to_everybody_without_keys(pingjia: Pingjia, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PINGJIA_API_KEYS", raising=False)
    found = only_fault(findings_of(pingjia, recipe(serve={"host": "0.0.0.0", "port": 0})))
    assert found["name"] == "port"
    assert "key" in found["detail"]


def test_the_whole_road_of_a_sound_recipe(
    pingjia: Pingjia, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_machine", lambda: iter(()))
    before = sorted(tmp_path.iterdir())
    file = recipe(cost={"price_per_hour": 3600.0})
    found = {f["name"]: f for f in findings_of(pingjia, file)}
    assert {f["state"] for f in found.values()} == {"ok"}, found
    assert "[[" in found["longest row"]["detail"]
    assert "tokens/s" in found["training"]["detail"]
    assert "CNY" in found["training"]["detail"]
    assert "logits within" in found["merge"]["detail"]
    assert "INT8" in found["quantise"]["detail"]
    assert "over HTTP" in found["answering"]["detail"]
    assert sorted(tmp_path.iterdir()) == sorted([*before, file, tmp_path / "rows.jsonl"])
