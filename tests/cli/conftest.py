"""Command lines run in this process, and recipes for a network that trains in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from pingjia.cli.main import invoke


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Pingjia = Callable[..., Outcome]

ROWS = [
    {"prompt": "冰箱保修多久？", "response": "整机保修36个月。", "facts": ["36个月"]},
    {"prompt": "客服电话是多少？", "response": "400-820-1234。", "facts": ["400-820-1234"]},
    {"prompt": "How much is the kettle?", "response": "129 yuan.", "facts": ["129"]},
    {"prompt": "可以开发票吗？", "response": "可以。"},
]


@pytest.fixture
def pingjia(capfd: pytest.CaptureFixture[str]) -> Pingjia:
    """pingjia("train", path, ...) -> exit code, stdout, stderr."""

    def run(*arguments: object, debug: bool = False) -> Outcome:
        capfd.readouterr()
        code = invoke([str(a) for a in arguments], debug=debug)
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return file

    return write


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path, write_rows: Callable[..., Path]) -> Callable[..., Path]:
    """recipe(**changed): the file of a complete short recipe on the tiny network; None leaves a key out."""

    def write(name: str = "recipe.yaml", **changed: Any) -> Path:
        if not (tmp_path / "rows.jsonl").exists():
            write_rows(ROWS)
        values = {
            "model_name_or_path": str(tiny_llama),
            "device": "cpu",
            "dataset": str(tmp_path / "rows.jsonl"),
            "output_dir": str(tmp_path / "out"),
            "lora_rank": 4,
            "lora_target": "all",
            "learning_rate": 1e-3,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "save_steps": 2,
            "eval": {"questions": str(tmp_path / "rows.jsonl"), "max_tokens": 4},
            "serve": {"port": 0},
            "ask": {"questions": ["冰箱保修多久？"], "max_tokens": 4},
            **changed,
        }
        file = tmp_path / name
        text = yaml.safe_dump({k: v for k, v in values.items() if v is not None}, allow_unicode=True)
        file.write_text(text, encoding="utf-8")
        return file

    return write
