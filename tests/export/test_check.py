"""The five classic faults of an export, planted in a directory that is there: each is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

from pingjia.cli.main import invoke
from pingjia.data.settings import DataSettings
from pingjia.models.settings import ModelSettings
from pingjia.tune import train
from pingjia.tune.settings import TuneSettings

Check = Callable[..., tuple[int, str]]


def _train(folder: Path, base: Path, seed: int) -> Path:
    rows = [{"prompt": "冰箱保修多久？", "response": "三年。"}, {"prompt": "How much is it?", "response": "129 yuan."}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    out = folder / f"out{seed}"
    train(
        ModelSettings(model_name_or_path=str(base), device="cpu"),
        DataSettings(dataset=str(folder / "rows.jsonl")),
        TuneSettings(output_dir=str(out), lora_rank=4, lora_target="all", learning_rate=0.02, max_steps=6, seed=seed),
    )
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Path]:
    """Two runs, and each one's adapter merged."""
    folder = tmp_path_factory.mktemp("made")
    found: dict[str, Path] = {}
    for seed in (1, 2):
        found[f"adapter{seed}"] = _train(folder, tiny_llama, seed)
        found[f"merged{seed}"] = folder / f"merged{seed}"
        assert invoke(["export", str(found[f"adapter{seed}"]), "--out", str(found[f"merged{seed}"])]) == 0
    return found


@pytest.fixture
def copies(made: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies that a test may spoil."""
    for name, path in made.items():
        shutil.copytree(path, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-*"))
    return {name: tmp_path / name for name in made}


@pytest.fixture
def check(capfd: pytest.CaptureFixture[str]) -> Check:
    def run(adapter: Path, exported: Path) -> tuple[int, str]:
        capfd.readouterr()
        code = invoke(["export", str(adapter), "--check", str(exported)])
        said = capfd.readouterr()
        return code, said.err if code else said.out

    return run


def test_what_was_exported_passes(copies: dict[str, Path], check: Check) -> None:
    code, said = check(copies["adapter1"], copies["merged1"])
    assert code == 0
    assert "every tensor is there, and the tokenizer" in said


def test_the_base_saved_again(copies: dict[str, Path], check: Check, tiny_llama: Path) -> None:
    shutil.copy(tiny_llama / "model.safetensors", copies["merged1"])
    code, said = check(copies["adapter1"], copies["merged1"])
    assert code == 2
    assert "equals its base: the adapter was not merged" in said


def test_the_directory_of_another_run(copies: dict[str, Path], check: Check) -> None:
    code, said = check(copies["adapter1"], copies["merged2"])
    assert code == 2
    assert "does not answer as the adapter did" in said


def test_adapter_files_of_another_run(copies: dict[str, Path], check: Check) -> None:
    shutil.copy(copies["adapter2"] / "adapter_model.safetensors", copies["adapter1"])
    code, said = check(copies["adapter1"], copies["merged1"])
    assert code == 2
    assert "adapter_model.safetensors is not the file that the run wrote" in said
    assert invoke(["export", str(copies["adapter1"]), "--out", str(copies["merged1"].parent / "new")]) == 2
    assert not (copies["merged1"].parent / "new").exists()


def test_another_alpha(copies: dict[str, Path], check: Check) -> None:
    file = copies["adapter1"] / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    trained = int(config["lora_alpha"])
    file.write_text(json.dumps(config | {"lora_alpha": trained * 2}), encoding="utf-8")
    code, said = check(copies["adapter1"], copies["merged1"])
    assert code == 2
    assert f"(lora_alpha is {trained * 2}, trained with {trained})" in said


def test_a_tensor_is_missing(copies: dict[str, Path], check: Check) -> None:
    file = copies["merged1"] / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(n for n in tensors if "down_proj" in n)
    del tensors[name]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    code, said = check(copies["adapter1"], copies["merged1"])
    assert code == 2
    assert "1 tensors are missing" in said
    assert name in said


def test_the_tokenizer_is_missing(copies: dict[str, Path], check: Check) -> None:
    for path in copies["merged1"].glob("*token*"):
        path.unlink()
    code, said = check(copies["adapter1"], copies["merged1"])
    assert code == 2
    assert "tokenizer is missing or another one" in said


def test_what_cannot_be_checked(copies: dict[str, Path], check: Check, tmp_path: Path) -> None:
    assert check(copies["adapter1"], tmp_path)[0] == 2
    assert check(copies["merged1"], copies["merged1"])[0] == 2
    assert invoke(["export", str(copies["adapter1"])]) == 2
    assert invoke(["export", str(copies["adapter1"]), "--out", "x", "--check", "y"]) == 2
