"""`pingjia run` from end to end on a tiny network, and what is done again when something has changed."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pingjia.ledger import Ledger

Pingjia = Callable[..., Any]
Recipe = Callable[..., Path]
STAGES = ("1 check data", "2 tune", "3 compare before and after", "4 serve and ask", "5 the bill")


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def went_well(outcome: Any) -> str:
    assert outcome.code == 0, outcome.out + outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    return outcome.out


def test_the_whole_road_and_then_again(
    pingjia: Pingjia, recipe: Recipe, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    file, out = recipe(), tmp_path / "out"

    first = went_well(pingjia("run", file))
    assert [first.index(stage) for stage in STAGES] == sorted(first.index(stage) for stage in STAGES)
    assert "4 rows, 4 good, 0 problems" in first
    assert "adapter on 21 linears" in first
    assert "4 updates in" in first
    assert "rouge_l" in first
    assert "serving at http://127.0.0.1:" in first
    assert "> 冰箱保修多久？" in first
    assert "(4 tokens in" in first
    assert "server stopped" in first
    assert "unchanged" not in first
    for name in ("pingjia.json", "adapter_config.json", "training_loss.png", "trainer_log.jsonl", "eval/before.json",
                 "eval/after.json", "eval/comparison.html", "serve.log"):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    kinds = [fact.kind for fact in Ledger(out / "ledger.jsonl").read()]
    assert {"data.check", "train", "eval.before", "eval.after", "serve"} <= {
        k if k != "serve.request" else "serve" for k in kinds
    }
    trained = weights(out)

    second = went_well(pingjia("run", file))
    assert "unchanged since the last run: 4 rows, no problem; not checked again" in second
    assert "not trained again" in second
    assert "unchanged since the last run; not asked again" in second
    assert "> 冰箱保修多久？" in second
    assert weights(out) == trained
    again = [fact.kind for fact in Ledger(out / "ledger.jsonl").read()][len(kinds) :]
    assert not {"data.check", "train", "eval.before", "eval.after"} & set(again)
    assert again, "the questions of the second run cost something too"

    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    write_rows([*rows, {"prompt": "周末上班吗？", "response": "上班。", "facts": ["上班"]}])
    third = went_well(pingjia("run", file))
    assert "unchanged" not in third
    assert "inputs have changed since the last run: training anew" in third
    assert "5 rows, 5 good" in third
    assert weights(out) != trained


def test_a_run_that_was_stopped_goes_on(pingjia: Pingjia, recipe: Recipe, tmp_path: Path) -> None:
    """Killed after its first checkpoint; `run` goes on from there and ends with the bytes of `train` in one go."""
    file = recipe(eval=None)
    went_well(pingjia("train", file, f"output_dir={tmp_path / 'whole'}"))
    script = (
        "import sys, os, signal\n"
        "from pingjia.tune import checkpoint\n"
        "save = checkpoint.save_checkpoint\n"
        "def once(*args, **kwargs):\n"
        "    save(*args, **kwargs); os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.save_checkpoint = once\n"
        "from pingjia.cli.main import invoke\n"
        "invoke(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", script, "run", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    said = went_well(pingjia("run", file))
    assert "going on from" in said
    assert "checkpoint-000002" in said
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert "3 compare" not in said


def test_a_run_on_changed_data_can_be_killed_at_any_time(
    pingjia: Pingjia, recipe: Recipe, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    """While it loads, and after its first checkpoint: the same command ends with the weights of a fresh run."""
    from pingjia.cli import run as verb
    from pingjia.tune import run as job

    class Killed(BaseException):
        pass

    def die(*args: Any, **kwargs: Any) -> None:
        raise Killed

    file = recipe(eval=None)
    rows = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb.Road, "_serve_and_ask", lambda self: None)
        went_well(pingjia("run", file))
        write_rows([json.loads(rows[0]), {"prompt": "周末上班吗？", "response": "上班。"}, *map(json.loads, rows[2:])])
        went_well(pingjia("train", file, f"output_dir={tmp_path / 'fresh'}"))
        # While it loads, and when its first checkpoint is whole and to be billed.
        for owner, name in ((job, "load_model"), (job.Account, "note")):
            with pytest.MonkeyPatch.context() as fault:
                fault.setattr(owner, name, die)
                with pytest.raises(Killed):
                    pingjia("run", file)
        said = went_well(pingjia("run", file))
    assert "going on from" in said
    assert "checkpoint-000002" in said
    assert weights(tmp_path / "out") == weights(tmp_path / "fresh")


def test_ctrl_c_saves_and_the_same_command_goes_on(pingjia: Pingjia, recipe: Recipe, tmp_path: Path) -> None:
    import os
    import signal

    from pingjia.tune import loop

    before = signal.getsignal(signal.SIGINT)
    file = recipe()
    real = loop.update

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "update", interrupted)
        outcome = pingjia("train", file)
    assert outcome.code == 130
    assert "stopped after update 1; the same command goes on from there" in outcome.out
    assert "going on from" in went_well(pingjia("train", file))
    assert signal.getsignal(signal.SIGINT) is before


def test_train_then_eval_then_export_then_bill(pingjia: Pingjia, recipe: Recipe, tmp_path: Path) -> None:
    file = recipe()
    assert "already trained" not in went_well(pingjia("train", file))
    assert "already trained from these very inputs; nothing to do" in went_well(pingjia("train", file))

    compared = json.loads(went_well(pingjia("eval", file, "--json")))
    assert "rouge_l" in json.dumps(compared)

    merged = tmp_path / "merged"
    report = json.loads(went_well(pingjia("export", tmp_path / "out", "--out", merged, "--json")))
    assert report["num_merged_modules"] == 21
    assert report["max_logit_diff"] <= report["tolerance"]
    assert (merged / "model.safetensors").is_file()
    assert (merged / "tokenizer.json").is_file()
    refused = pingjia("export", tmp_path / "out", "--out", merged)
    assert refused.code == 2
    assert "exists; choose a new directory" in refused.err

    bill = went_well(pingjia("cost", "report", tmp_path / "out"))
    assert "train" in bill
    as_json = json.loads(
        went_well(pingjia("cost", "report", tmp_path / "out" / "ledger.jsonl", "price_per_hour=3600", "--json"))
    )
    assert as_json
    assert len(went_well(pingjia("cost", "report", tmp_path / "out", "--csv")).splitlines()) >= 3
    bad = pingjia("cost", "report", tmp_path / "out", "price_per_hours=1")
    assert bad.code == 2
    assert "did you mean price_per_hour?" in bad.err


def test_env_and_version(pingjia: Pingjia) -> None:
    from pingjia import __version__

    assert went_well(pingjia("version")) == f"pingjia {__version__}\n"
    found = json.loads(went_well(pingjia("env", "--json")))
    assert found["packages"]["torch"]
    assert found["memory_bytes"] > 0
    assert "torch" in went_well(pingjia("env"))


@pytest.fixture
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    from pingjia.cli import machine

    monkeypatch.setattr(machine, "measure_read_bandwidth", lambda *args, **kwargs: 10.0)


@pytest.mark.usefixtures("quick_bandwidth")
def test_doctor_walks_the_whole_road(pingjia: Pingjia, recipe: Recipe, tmp_path: Path) -> None:
    outcome = pingjia("doctor", recipe(), "--json")
    findings = {f["name"]: f for f in json.loads(outcome.out)}
    for name in ("recipe", "data", "train-serve identity", "training", "answering", "port"):
        assert findings[name]["state"] == "ok", findings[name]
    assert "4 rows, no problem" in findings["data"]["detail"]
    assert "saved and read back bit by bit" in findings["training"]["detail"]
    assert outcome.code == (2 if any(f["state"] == "bad" for f in findings.values()) else 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick_bandwidth")
@pytest.mark.parametrize(
    ("changed", "stage", "words"),
    [
        ({"lora_rnak": 3}, "recipe", "did you mean lora_rank?"),
        ({"dataset": "nowhere.jsonl"}, "data", "nowhere.jsonl"),
        ({"lora_target": "q_porj"}, "training", "did you mean q_proj?"),
        ({"model_name_or_path": "/nowhere"}, "data", "no such model directory"),
    ],
)
def test_doctor_says_what_is_wrong_and_stops_there(
    pingjia: Pingjia, recipe: Recipe, changed: dict[str, Any], stage: str, words: str
) -> None:
    outcome = pingjia("doctor", recipe(**changed), "--json")
    last = json.loads(outcome.out)[-1]
    assert outcome.code == 2
    assert (last["name"], last["state"]) == (stage, "bad")
    assert words in last["detail"]
    assert last["fix"]


def test_chat_through_a_pipe(
    pingjia: Pingjia, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "chat.jsonl"
    typed = f"/system 你是客服\n你好\n/nonsense\n再说一遍\n/save {saved}\n/reset\n/quit\n不会问到\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    outcome = pingjia("chat", tiny_llama, "--max-tokens", 5)
    assert outcome.code == 0, outcome.err
    assert "unknown command '/nonsense'" in outcome.err
    assert "不会问到" not in outcome.out
    row = json.loads(saved.read_text(encoding="utf-8"))
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    assert outcome.out.startswith(answers[0] + "\n" + answers[1])
    assert pingjia("data", "check", saved).code in (0, 2)


def test_chat_ends_with_its_input(pingjia: Pingjia, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    outcome = pingjia("chat", tiny_llama)
    assert (outcome.code, outcome.out) == (0, "")


def test_an_answer_too_long_keeps_the_conversation(
    pingjia: Pingjia, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("你" * 3000 + "\n你好\n"))
    outcome = pingjia("chat", tiny_llama, "--max-tokens", 3)
    assert outcome.code == 0
    assert "error: " in outcome.err
    assert "512" in outcome.err
    assert outcome.out.endswith("\n")


def test_prepare_sets_bad_rows_aside(
    pingjia: Pingjia, recipe: Recipe, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows(
        [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}, {"prompt": "a", "response": "long " * 300}]
    )
    out = tmp_path / "prepared"
    outcome = pingjia("data", "prepare", recipe(dataset=str(rows), cutoff_len=64), "--out", out)
    assert outcome.code == 0, outcome.err
    assert "3 rows: 1 kept, 2 left out" in outcome.out
    assert "left out 1: repeated" in outcome.out
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    again = pingjia("data", "prepare", recipe(dataset=str(rows), cutoff_len=64), "--out", out, "--json")
    assert json.loads(again.out)["num_kept"] == 1
    assert len((out / "train.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    assert len((out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert pingjia("train", recipe(dataset=str(out / "train.jsonl"), cutoff_len=64, max_steps=2)).code == 0


def test_a_recipe_that_prepares_trains_on_the_result(
    pingjia: Pingjia, recipe: Recipe, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    good = [{"prompt": f"第{word}问？", "response": f"这是{word}的答案。"} for word in "春夏秋冬"]
    rows = write_rows([*good, good[0], {"prompt": "再问一次？", "response": "再问一次？"}])
    outcome = pingjia("train", recipe(dataset=str(rows), max_steps=2, prepare={"rules": {"skip": []}}))
    assert outcome.code == 0, outcome.err
    assert "left out 1: duplicate" in outcome.out
    assert "left out 1: echo" in outcome.out
    assert "4 rows," in outcome.out
    about = json.loads((tmp_path / "out" / "pingjia.json").read_text(encoding="utf-8"))
    assert about["data"]["num_rows"] == 4
    assert about["data"]["files"][0].endswith("data/train.jsonl")
