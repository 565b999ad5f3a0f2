"""`pingjia cost compare` on the tiny network: arms really run, in processes of their own, and are not run twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pingjia.cli import compare_arms, compare_serving
from pingjia.cli.compare_arms import ARMS, Length, first_rate, recipe_of, run_child
from pingjia.cli.schema import load_recipe
from pingjia.errors import TrainingError
from tests.cli.conftest import ROWS, Pingjia

Recipe = Callable[..., Path]
SHORT = ("--arms", "full,lora", "--updates", 4, "--look", 2, "--trial-updates", 0, "--held-out", 4, "--no-serving")


def test_two_arms_run_to_one_loss_and_are_not_run_again(
    pingjia: Pingjia, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(eval_dataset=str(tmp_path / "rows.jsonl"), learning_rate=1e-2, lora_dropout=0.0)
    outcome = pingjia("cost", "compare", file, *SHORT, "cost.price_per_hour=3600", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    full, lora = found["measured"]["rows"]
    assert (full["arm"], lora["arm"]) == ("full", "lora")
    assert full["learning_rate"] == pytest.approx(1e-3)
    assert lora["learning_rate"] == 1e-2
    target = found["measured"]["held_out_loss"]
    assert target == max(min(p["loss"] for p in arm["curve"]) for arm in found["measured"]["arms"])
    assert all(arm["curve"][0]["loss"] > target for arm in found["measured"]["arms"])
    for row in (full, lora):
        assert row["money"] == pytest.approx(row["train_hours"] * 3600, rel=0.02)  # a unit for each second
        assert 0 < row["updates_to_loss"] <= 4
        assert row["peak_bytes"] > 1e8  # of the arm's own process
    assert lora["num_trainable"] < full["num_trainable"]
    assert lora["stored_bytes"] < full["stored_bytes"]
    assert not found["extrapolated"]["is_measured"]
    assert [claim["measured"] is None for claim in found["claims"]] == [False, False, True, False]

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was run again")

    monkeypatch.setattr(compare_arms, "run_child", fail)
    again = pingjia("cost", "compare", file, *SHORT, "cost.price_per_hour=7200")
    assert again.code == 0, again.err
    measured, _, estimated = again.out.partition("ESTIMATED, not measured")
    assert "measured already" in again.err
    assert "ChatGLM-6B" in estimated
    assert "ChatGLM-6B" not in measured
    table = pingjia("cost", "compare", file, *SHORT, "--csv").out
    assert table == (tmp_path / "out" / "compare" / "compare.csv").read_text(encoding="utf-8")
    refused = pingjia("cost", "compare", file, *SHORT, "--loss", "0.0001")
    assert refused.code == 2
    assert "was not reached by full" in refused.err
    assert "every arm reached" in refused.err


@pytest.mark.parametrize(
    ("changed", "words", "said"),
    [
        ({}, (), "eval_dataset: missing"),
        ({"eval_dataset": "rows.jsonl"}, ("--arms", "lora"), "at least two different ones of full"),
        ({"eval_dataset": "rows.jsonl"}, ("--arms", "lora,lara"), "at least two different ones of full"),
        ({"eval_dataset": "rows.jsonl"}, ("--look", 9, "--updates", 4), "a look within them"),
        ({"eval_dataset": "rows.jsonl"}, ("--held-out", 2), "at least 4 rows"),
    ],
)
def test_nonsense_is_refused_before_anything_runs(
    pingjia: Pingjia, recipe: Recipe, tmp_path: Path, changed: dict[str, Any], words: tuple[Any, ...], said: str
) -> None:
    given = {key: str(tmp_path / value) for key, value in changed.items()}
    outcome = pingjia("cost", "compare", recipe(**given), *words)
    assert outcome.code == 2
    assert said in outcome.err


def test_too_few_held_out_rows(pingjia: Pingjia, recipe: Recipe, write_rows: Callable[..., Path]) -> None:
    few = write_rows(ROWS[:2], "few.jsonl")
    outcome = pingjia("cost", "compare", recipe(eval_dataset=str(few)))
    assert outcome.code == 2
    assert "eval_dataset: 2 rows; at least 4" in outcome.err


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_a_recipe_that_loads(recipe: Recipe, tmp_path: Path, arm: str) -> None:
    file = recipe(phases=[{"target": "attention"}], early_stopping_patience=3, quantization_bit=4, lora_l2=0.01)
    made = recipe_of(load_recipe(file), arm, tmp_path / "held.jsonl")
    written = tmp_path / "arm.yaml"
    written.write_text(json.dumps(made), encoding="utf-8")
    loaded = load_recipe(written)
    assert loaded.tune.finetuning_type == ("full" if arm == "full" else "lora")
    assert loaded.model.quantization_bit == {"qlora_int8": 8, "qlora_int4": 4}.get(arm)
    assert loaded.data.dataset == load_recipe(file).data.dataset
    assert not loaded.tune.phases


def test_the_first_rate_of_full_fine_tuning_is_a_tenth() -> None:
    assert [first_rate(arm, 1e-3) for arm in ("full", "lora", "qlora_int4")] == [1e-4, 1e-3, 1e-3]


def test_a_look_is_a_point_and_its_own_time_is_in_none() -> None:
    logs = [{"step": i + 1, "seconds": 2.0, "num_tokens": 10, "eval_loss": i if i % 2 else None} for i in range(4)]
    assert compare_arms.curve(logs) == [
        {"updates": 2, "seconds": 4.0, "tokens": 20, "loss": 1},
        {"updates": 4, "seconds": 8.0, "tokens": 40, "loss": 3},
    ]


def test_a_child_that_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    import sys

    code = "import sys; sys.stderr.write('the disk is full\\n'); sys.exit(3)"
    with pytest.raises(TrainingError, match=r"ended with 3: the disk is full .*child\.log"):
        run_child([sys.executable, "-c", code], tmp_path / "child.log")
    assert run_child([sys.executable, "-c", "print('words'); print('{\"a\": 1}')"], tmp_path / "x.log") == {"a": 1}
    assert run_child([sys.executable, "-c", "print('words')"], tmp_path / "x.log") == {}


@pytest.mark.parametrize("way", ["one", "batch", "cached"])
def test_every_way_to_answer_is_measured(tiny_llama: Path, way: str) -> None:
    job = compare_serving.Job(str(tiny_llama), ("你好", "How much is it?"), 4, device="cpu", way=way)
    assert compare_serving.Job.of(job.to_line()) == job
    found = getattr(compare_serving, f"_{way}")(job)
    assert found["first_token_s"] > 0
    assert found["answer_s"] >= found["first_token_s"]
    assert found["tokens_per_s"] > 0
    assert (found["per_token_s"] == 0) == (way == "cached")


def test_lengths() -> None:
    Length(2, 1, 0).check()
    with pytest.raises(Exception, match="at least 2 updates"):
        Length(1, 1, 0).check()


class Scripted:
    """Children that leave what a run leaves, without training. `breaks`: the arm at which the comparison is stopped."""

    def __init__(self) -> None:
        self.breaks = ""
        self.trained: list[str] = []

    def __call__(self, command: list[str], log: Path) -> dict[str, Any]:
        if command[2] == "pingjia.cli.compare_start":
            return {"loss": 4.0}
        out = Path(command[-1]).parent
        if out.parent.name == self.breaks:
            raise KeyboardInterrupt
        self.trained.append(f"{out.parent.name} {out.name}")
        tensor = {"a": torch.zeros(2, 3)}
        safetensors.torch.save_file(tensor, out / "adapter_model.safetensors")
        line = {"step": 4, "seconds": 2.0, "num_tokens": 10, "eval_loss": 2.0 if "full" in str(out) else 1.0}
        (out / "trainer_log.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
        (out / "pingjia.json").write_text(json.dumps({"metrics": {"peak_bytes": 7}}), encoding="utf-8")
        return {}


def test_a_stopped_comparison_keeps_the_arms_that_are_done(
    pingjia: Pingjia, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Scripted()
    monkeypatch.setattr(compare_arms, "run_child", children)
    words = ("cost", "compare", recipe(eval_dataset=str(tmp_path / "rows.jsonl")), "--no-serving", "--held-out", 4)
    children.breaks = "qlora_int8"
    assert pingjia(*words).code == 130
    done = list(children.trained)
    assert done == [f"{arm} {what}" for arm, what in RUNS[:6]]
    children.breaks = ""
    outcome = pingjia(*words, "--json")
    assert outcome.code == 0, outcome.err
    assert children.trained == [f"{arm} {what}" for arm, what in RUNS]
    found = json.loads(outcome.out)["measured"]
    assert found["held_out_loss"] == 2.0
    assert [row["num_trainable"] for row in found["rows"]] == [6] * 4
    assert found["rows"][1]["train_hours"] == pytest.approx(2 * (4 - 2) / (4 - 1) / 3600, rel=1e-3)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]) + "\n" * 2, encoding="utf-8")
    assert pingjia(*words).code == 2  # other rows: nothing of the old result is passed off as theirs


RUNS = [
    (arm, what)
    for arm, rates in (("full", ("1e-4", "3.33333e-05")), *((arm, ("0.001", "0.000333333")) for arm in list(ARMS)[1:]))
    for what in (*(f"trial-{float(rate):g}" for rate in rates), "run")
]
