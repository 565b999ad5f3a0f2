"""A run with a past that is killed at any moment ends with the bytes of one that was not: frozen ranks, penalties,
replayed rows and all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pingjia.data.settings import DataSettings
from pingjia.models.settings import ModelSettings
from pingjia.tune import TrainResult, train
from pingjia.tune.journal import read_log
from pingjia.tune.settings import TuneSettings

METHODS = {
    "grow": {"method": "grow", "replay_ratio": 0.5, "max_rank": 6, "min_retention": 0.0},
    "ewc": {"method": "ewc", "ewc": 1e4, "replay_ratio": 0.5, "min_retention": 0.0},
}


def run(job: dict[str, Any]) -> TrainResult:
    return train(
        ModelSettings.model_validate(job["model"]),
        DataSettings.model_validate(job["data"]),
        TuneSettings.model_validate(job["tune"]),
    )


@pytest.fixture(scope="session")
def wholes(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, rows_file: Path, settings: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Method -> the job of a finished run."""
    folder = tmp_path_factory.mktemp("continual")
    new = folder / "new.jsonl"
    rows = [{"prompt": f"{n} 号门在哪？", "response": f"在 {n} 楼东侧。"} for n in range(5)]
    new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    held = folder / "held.jsonl"
    held.write_text(json.dumps({"prompt": "保修几年？", "response": "三年。"}, ensure_ascii=False), encoding="utf-8")
    model = {"model_name_or_path": str(tiny_llama), "device": "cpu"}
    data = {"dataset": str(rows_file), "eval_dataset": str(held)}
    run({"model": model, "data": data, "tune": settings | {"output_dir": str(folder / "first")}})
    jobs = {}
    for method, continual in METHODS.items():
        own = {"output_dir": str(folder / method), "continue_from": str(folder / "first"), "continual": continual}
        jobs[method] = {
            "model": model,
            "data": {"dataset": str(new)},
            "tune": settings | {"num_train_epochs": 3, "lora_l2": 1e-6} | own,
        }
        run(jobs[method])
    return jobs


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_with_the_same_bytes(
    killed: Callable[..., int], wholes: dict[str, dict[str, Any]], tmp_path: Path, method: str, seed: int
) -> None:
    job, out = wholes[method], tmp_path / "out"
    whole = Path(job["tune"]["output_dir"])
    assert killed(job, out, seed, max_kills=6) >= 1, "nothing was killed: the test has shown nothing"
    assert digest(out / "adapter_model.safetensors") == digest(whole / "adapter_model.safetensors")
    assert config(out) == config(whole)
    assert not (out / "candidate").exists()
    logs, expected = (read_log(folder / "trainer_log.jsonl") for folder in (out, whole))
    strip = [(log.step, log.loss, log.l2, log.orthogonality, log.ewc) for log in logs]
    assert strip == [(log.step, log.loss, log.l2, log.orthogonality, log.ewc) for log in expected]
    term = "ewc" if method == "ewc" else "orthogonality"
    assert all(getattr(log, term) is not None for log in logs)
    retention = [json.loads((folder / "pingjia.json").read_text())["retention"] for folder in (out, whole)]
    strip_names = [[(r["before"], r["after"]) for r in found] for found in retention]
    assert strip_names[0] == strip_names[1]


def config(folder: Path) -> dict[str, Any]:
    """PEFT writes target_modules in any order."""
    read = json.loads((folder / "adapter_config.json").read_text())
    return read | {"target_modules": sorted(read["target_modules"])}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
