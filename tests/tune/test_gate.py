"""The retention gate: a run that forgets is not promoted, and says by how much; one that does not forget is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pingjia.chat import load_tokenizer
from pingjia.cli.probes import examine, print_retention
from pingjia.cli.schema import Recipe
from pingjia.data.settings import DataSettings
from pingjia.errors import UserError
from pingjia.models import load_model
from pingjia.models.settings import ModelSettings
from pingjia.tune import Hooks, TrainResult
from pingjia.tune.gate import Retention, RetentionError, Score, failed
from pingjia.tune.keep import Kept
from pingjia.tune.settings import TuneSettings
from pingjia.types import Example, Message

Train = Callable[..., TrainResult]
NEW = [
    {"prompt": "冰箱保修多久？", "response": "不保修。", "facts": ["不保修"]},
    {"prompt": "怎么退货？", "response": "不能退。", "facts": ["不能退"]},
    {"prompt": "可以开发票吗？", "response": "不可以。", "facts": ["不可以"]},
]
STRONG: dict[str, Any] = {"learning_rate": 0.02, "lora_dropout": 0.0, "num_train_epochs": 15}


def retention(before: Score, after: Score) -> Retention:
    return Retention("a", True, before, after)


@pytest.mark.parametrize(
    ("before", "after", "by", "share"),
    [
        (Score(1.0, 0.8, 10), Score(3.0, 0.6, 10), "facts", 0.75),
        (Score(1.0, 0.0, 10), Score(1.5, 0.0, 10), "likelihood", math.exp(-0.5)),
        (Score(1.0), Score(0.5), "likelihood", math.exp(0.5)),
        (Score(1.0, 0.5, 4), Score(9.0, 1.0, 4), "facts", 2.0),
    ],
)
def test_what_is_kept_is_a_share_of_the_score_before(before: Score, after: Score, by: str, share: float) -> None:
    found = retention(before, after)
    assert found.by == by
    assert found.share == pytest.approx(share)


def test_only_earlier_probes_are_judged() -> None:
    bad = retention(Score(1.0), Score(2.0))
    own = Retention("b", False, Score(1.0), Score(2.0))
    assert failed([bad, own], 0.9) == [bad]
    assert failed([bad, own], 0.3) == []


@pytest.fixture
def new_file(tmp_path: Path) -> Path:
    """Rows that contradict the room's."""
    file = tmp_path / "new.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in NEW), encoding="utf-8")
    return file


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """Held-out rows of the first task."""
    rows = [
        {"prompt": "冰箱保修几年？", "response": "整机保修三十六个月。", "facts": ["三十六个月"]},
        {"prompt": "Kettle price?", "response": "129 yuan.", "facts": ["129 yuan"]},
    ]
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def first(tune: Train, held: Path, tmp_path: Path) -> Path:
    tune(**STRONG, output_dir=str(tmp_path / "first"), data={"eval_dataset": [str(held)]})
    return tmp_path / "first"


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pingjia.json").read_text(encoding="utf-8"))


def test_a_run_that_forgets_is_set_aside_with_its_numbers(
    tune: Train, first: Path, new_file: Path, tmp_path: Path
) -> None:
    kept: list[Kept] = []
    run: dict[str, Any] = STRONG | {"dataset": new_file, "continue_from": str(first)}
    with pytest.raises(RetentionError, match=r"not promoted: 1 earlier probe.*first: loss .* -> .* left.*candidate"):
        tune(**run, continual={"min_retention": 0.99}, hooks=Hooks(on_retention=kept.append))
    out = tmp_path / "out"
    assert issubclass(RetentionError, UserError)  # exit code 2
    assert not (out / "pingjia.json").exists()
    assert not (out / "adapter_model.safetensors").exists()
    assert (out / "candidate" / "adapter_model.safetensors").is_file()
    assert [(r.probe, r.is_earlier) for r in kept[0].retention] == [("first", True)]
    assert kept[0].retention[0].share < 0.99
    candidate = (out / "candidate" / "adapter_model.safetensors").read_bytes()
    # The same command with a lower bar trains nothing again and promotes those very weights.
    steps: list[int] = []
    result = tune(**run, continual={"min_retention": 0.0}, hooks=Hooks(on_step=lambda log: steps.append(log.step)))
    assert result.finished
    assert steps == []
    assert (out / "adapter_model.safetensors").read_bytes() == candidate
    assert not (out / "candidate").exists()


def test_the_accuracy_matrix_grows_stage_by_stage(
    tune: Train, first: Path, new_file: Path, held: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loose = {"min_retention": 0.0}
    tune(
        dataset=new_file,
        output_dir=str(tmp_path / "second"),
        continue_from=str(first),
        continual=loose,
        data={"eval_dataset": [str(new_file)]},
    )
    kept_now: list[Kept] = []
    tune(
        output_dir=str(tmp_path / "third"),
        continue_from=str(tmp_path / "second"),
        continual=loose,
        hooks=Hooks(on_retention=kept_now.append),
    )
    print_retention(kept_now[0])
    printed = capsys.readouterr().out
    assert re.search(r"after +first +second\n +first +loss [\d.]+ +loss [\d.]+\n +second .*\n +third ", printed)
    matrix = about(tmp_path / "third")["accuracy"]
    assert [(row["stage"], sorted(row["scores"])) for row in matrix] == [
        ("first", ["first", "second"]),
        ("second", ["first", "second"]),
        ("third", ["first", "second"]),
    ]
    assert all(score["loss"] > 0 for row in matrix for score in row["scores"].values())
    assert about(tmp_path / "third")["probes"]["first"]["files"] == [str(held)]
    kept = about(tmp_path / "third")["retention"]
    assert kept[0]["before"] == pytest.approx(matrix[1]["scores"]["first"])


def test_facts_are_asked_of_both_adapters_and_decide(tune: Train, first: Path, new_file: Path, tmp_path: Path) -> None:
    asked: list[Any] = []

    def answers(network: Any, adapters: Sequence[Path | None], questions: Sequence[Any]) -> list[list[bool]]:
        asked.append(([folder.name for folder in adapters if folder], [q.facts for q in questions]))
        return [[True, True], [True, False]]

    with pytest.raises(RetentionError, match=r"exact facts 100\.0% -> 50\.0% of 2 questions, 50\.0% left"):
        tune(dataset=new_file, continue_from=str(first), hooks=Hooks(examine=answers))
    assert asked == [(["first", "candidate"], [("三十六个月",), ("129 yuan",)])]


def test_the_engine_answers_probes_as_peft_does(
    tune: Train, first: Path, new_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """The base, the adapter before and the one after, on one network: each states what PEFT's own answer holds."""
    second = tune(**STRONG, dataset=new_file, continue_from=str(first), continual={"min_retention": 0.0}).output_dir
    prompt = (Message("user", "冰箱保修多久？"),)
    said = [greedy(tiny_llama, folder, prompt) for folder in (None, first, second)]
    facts = [next(c for c in text if c.isalpha()) for text in said[1:]]  # the base says nothing but newlines
    assert facts[0] not in said[2], f"{said}: answers alike; the test would show nothing"
    recipe = Recipe(
        model=ModelSettings(model_name_or_path=str(tiny_llama)),
        data=DataSettings(dataset=[str(new_file)]),
        tune=TuneSettings(output_dir="out", continual={"max_tokens": 8}),
    )
    questions = [Example((*prompt, Message("assistant", "?")), facts=(fact,)) for fact in facts]
    marks = examine(recipe, load_model(tiny_llama), [None, first, second], questions)
    assert marks == [[fact in text for fact in facts] for text in said]
    assert [marks[1][0], marks[2][1]] == [True, True]


def greedy(base: Path, adapter: Path | None, prompt: tuple[Message, ...]) -> str:
    """By transformers and PEFT."""
    tokenizer, model = load_tokenizer(base), load_model(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    ids = list(tokenizer.render(prompt))
    with torch.no_grad():
        for _ in range(8):
            ids = [*ids, int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return tokenizer.decode(ids[-8:])


def test_a_first_run_can_be_held_to_what_its_base_knew(tune: Train, held: Path, tmp_path: Path) -> None:
    tune(continual={"probes": {"general": str(held)}, "min_retention": 0.0})
    assert [row["stage"] for row in about(tmp_path / "out")["accuracy"]] == ["base", "out"]
    with pytest.raises(RetentionError):
        tune(continual={"probes": {"general": str(held)}, "min_retention": 99.0}, output_dir=str(tmp_path / "b"))
