"""Bad input: exit code 2, what is wrong and where in one clear line, and never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pingjia.cli import main

Pingjia = Callable[..., Any]
Recipe = Callable[..., Path]


def refused(outcome: Any, *words: str, lines: int = 1) -> None:
    """Exit code 2; stderr says `words` in at most `lines` lines beginning with "error:"; no traceback."""
    said = outcome.err.strip()
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err + outcome.out
    assert said.startswith("error: "), said
    assert len(said.splitlines()) <= lines, said
    for word in words:
        assert word in said


@pytest.mark.parametrize("verb", ["train", "run", "eval"])
def test_a_missing_recipe(pingjia: Pingjia, verb: str) -> None:
    refused(pingjia(verb, "nowhere.yaml"), "nowhere.yaml: no such recipe")


@pytest.mark.parametrize("verb", ["train", "run"])
def test_a_directory_instead_of_a_recipe(pingjia: Pingjia, verb: str, tmp_path: Path) -> None:
    refused(pingjia(verb, tmp_path), "is a directory; a recipe is one YAML file")


def test_an_unknown_key_names_the_near_miss(pingjia: Pingjia, recipe: Recipe) -> None:
    refused(pingjia("train", recipe(lora_rnak=3)), "lora_rnak: unknown key; did you mean lora_rank?")


def test_several_faults_are_told_at_once(pingjia: Pingjia, recipe: Recipe) -> None:
    file = recipe(lora_rnak=3, serve={"prot": 1}, learning_rate="fast", output_dir=None)
    outcome = pingjia("train", file)
    refused(outcome, "lora_rnak", "serve.prot: unknown key; did you mean port?", "output_dir: missing", lines=4)
    assert "learning_rate: input should be a valid number" in outcome.err


def test_a_bad_override(pingjia: Pingjia, recipe: Recipe) -> None:
    refused(pingjia("train", recipe(), "lora_rank"), "override 'lora_rank': write key=value")
    refused(pingjia("train", recipe(), "lora_rank=x"), "lora_rank:", "(found 'x')")
    refused(pingjia("train", recipe(), "eval.metric=rouge_l"), "eval.metric: unknown key; did you mean metrics?")


@pytest.mark.parametrize("verb", ["train", "run"])
def test_a_missing_model_directory(pingjia: Pingjia, recipe: Recipe, verb: str) -> None:
    refused(
        pingjia(verb, recipe(model_name_or_path="THUDM/chatglm-6b")), "no such model directory", "downloads nothing"
    )


@pytest.mark.parametrize("verb", ["train", "run"])
def test_a_missing_data_file(pingjia: Pingjia, recipe: Recipe, verb: str) -> None:
    outcome = pingjia(verb, recipe(dataset="nowhere.jsonl"))
    assert outcome.code == 2
    assert "nowhere.jsonl" in outcome.out + outcome.err
    assert "Traceback" not in outcome.out + outcome.err


def test_a_model_directory_without_a_tokenizer(
    pingjia: Pingjia, recipe: Recipe, tiny_llama: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    refused(pingjia("train", recipe(model_name_or_path=str(bare))), str(bare), "tokenizer")
    refused(pingjia("data", "check", tmp_path / "rows.jsonl", "--model", bare), str(bare), "tokenizer")


def test_a_model_directory_without_weights(pingjia: Pingjia, recipe: Recipe, tiny_llama: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare)
    (bare / "model.safetensors").unlink()
    refused(pingjia("train", recipe(model_name_or_path=str(bare))), str(bare))


def test_an_empty_model_directory(pingjia: Pingjia, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    refused(pingjia("train", recipe(model_name_or_path=str(tmp_path / "bare"))), "bare")


def test_an_output_dir_that_is_a_file(pingjia: Pingjia, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    refused(pingjia("train", recipe()), str(tmp_path / "out"))
    refused(pingjia("run", recipe()), str(tmp_path / "out"))
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


BAD_FILES = {
    "json": (b'{"prompt": "a", "response": "b"}\n{"prompt": "a", \n', "2: json: not valid JSON"),
    "empty answer": (
        b'{"prompt": "a", "response": "b"}\n\n{"prompt": "a", "response": " "}\n',
        "3: response: is empty",
    ),
    "roles": (
        json.dumps({"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}).encode(),
        "1: messages[0]: roles out of order",
    ),
    "array": (b"[1, 2]\n", "1: "),
    "number": (b"3\n", "1: "),
    "no answer": (b'{"prompt": "a"}\n', "1: "),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_data_check_prints_file_line_field_reason(pingjia: Pingjia, tmp_path: Path, fault: str) -> None:
    content, expected = BAD_FILES[fault]
    file = tmp_path / "d.jsonl"
    file.write_bytes(content)
    outcome = pingjia("data", "check", file)
    assert outcome.code == 2
    assert outcome.out.splitlines()[0].startswith(f"{file}:{expected}")
    assert len(outcome.out.splitlines()[0].split(": ")) >= 3
    assert not outcome.err


@pytest.mark.parametrize("fault", BAD_FILES)
@pytest.mark.parametrize("verb", ["train", "run"])
def test_bad_rows_stop_training_by_the_same_words(
    pingjia: Pingjia, recipe: Recipe, tmp_path: Path, fault: str, verb: str
) -> None:
    content, expected = BAD_FILES[fault]
    file = tmp_path / "d.jsonl"
    file.write_bytes(content)
    outcome = pingjia(verb, recipe(dataset=str(file)))
    assert outcome.code == 2
    assert f"{file}:{expected}" in outcome.out + outcome.err
    assert "data prepare" in outcome.err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_files_in_other_encodings_are_read_and_noted(pingjia: Pingjia, tmp_path: Path) -> None:
    row = '{"prompt": "你好，世界", "response": "好的，没有问题"}\n'
    (tmp_path / "gbk.jsonl").write_bytes(row.encode("gbk"))
    (tmp_path / "bom.jsonl").write_bytes(row.encode("utf-8-sig"))
    for name, word in (("gbk.jsonl", "GBK"), ("bom.jsonl", "BOM")):
        outcome = pingjia("data", "check", tmp_path / name)
        assert outcome.code == 0
        assert f"note: {tmp_path / name}:" in outcome.out
        assert word in outcome.out
        assert "1 rows, 1 good, 0 problems; Chinese 100%" in outcome.out


def test_a_directory_and_a_missing_file_given_as_data(pingjia: Pingjia, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.jsonl"):
        outcome = pingjia("data", "check", path)
        assert outcome.code == 2
        assert outcome.out.startswith(f"{path}:0: file: ")


def test_a_good_file(pingjia: Pingjia, write_rows: Callable[..., Path]) -> None:
    outcome = pingjia("data", "check", write_rows([{"prompt": "a", "response": "b"}]))
    assert (outcome.code, outcome.err) == (0, "")


def test_data_check_as_json(pingjia: Pingjia, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(BAD_FILES["json"][0])
    outcome = pingjia("data", "check", file, "--json")
    report = json.loads(outcome.out)
    assert (outcome.code, report["ok"], report["num_problems"]) == (2, False, 1)
    assert report["problems"][0]["line"] == 2


def test_data_check_counts_tokens_of_a_model(
    pingjia: Pingjia, write_rows: Callable[..., Path], tiny_llama: Path
) -> None:
    file = write_rows([{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "long " * 50}])
    outcome = pingjia("data", "check", file, "--model", tiny_llama, "--cutoff-len", 60)
    assert outcome.code == 2
    assert outcome.out.startswith(f"{file}:2: ")
    assert "length in tokens" in outcome.out


@pytest.mark.parametrize("verb", [["serve", "--port"], ["run", "serve.port="]])
def test_a_port_in_use_is_known_before_any_model_is_loaded(
    pingjia: Pingjia, recipe: Recipe, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: list[str]
) -> None:
    import pingjia as package

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(package, "Engine", load, raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        if verb[0] == "serve":
            outcome = pingjia("serve", tiny_llama, "--port", port)
        else:
            outcome = pingjia("run", recipe(), f"serve.port={port}")
    refused(outcome, str(port))
    assert not (tmp_path / "out").exists()


def test_listening_beyond_this_machine_needs_keys(
    pingjia: Pingjia, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PINGJIA_API_KEYS", raising=False)
    refused(pingjia("serve", tiny_llama, "--host", "0.0.0.0", "--port", 0), "key")


def test_serving_what_is_not_there(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path) -> None:
    outcome = pingjia("serve", tmp_path / "nowhere", "--port", 0)
    assert outcome.code == 2
    assert "no such model directory" in outcome.err
    outcome = pingjia("serve", tiny_llama, "--port", 0, "--adapter", tmp_path)
    assert outcome.code == 2
    assert f"error: {tmp_path}" in outcome.err
    refused(pingjia("serve", tiny_llama, "--adapter", "a=x", "--adapter", "a=y"), "two adapters are called 'a'")
    refused(pingjia("serve", tiny_llama, "--set", "engine.page_sise=3"), "engine.page_sise", "page_size")


def test_no_ledger_and_no_adapter(pingjia: Pingjia, tmp_path: Path) -> None:
    refused(pingjia("cost", "report", tmp_path), "ledger.jsonl: no ledger here")
    refused(pingjia("export", tmp_path, "--out", tmp_path / "merged"), "no finished run here")
    assert not (tmp_path / "merged").exists()


def test_eval_without_questions(pingjia: Pingjia, recipe: Recipe) -> None:
    refused(pingjia("eval", recipe(eval=None)), "eval.questions: missing")
    refused(pingjia("eval", recipe(), "--endpoint", "http://127.0.0.1:9/v1"), "--endpoint needs --model")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (["train"], "Missing argument"),
        (["nothing"], "No such command 'nothing'"),
        (["train", "--nope"], "No such option"),
        (["serve", "x", "--port", "abc"], "--port"),
        (["serve", "x", "--port", "70000"], "--port"),
        (["chat", "x", "--max-tokens", "0"], "--max-tokens"),
        (["data", "check"], "Missing argument"),
    ],
)
def test_a_line_that_cannot_be_parsed(pingjia: Pingjia, line: list[str], word: str) -> None:
    outcome = pingjia(*line)
    assert outcome.code == 2
    assert word in outcome.err
    assert "internal" not in outcome.err


def test_our_own_fault_is_exit_code_one(pingjia: Pingjia, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pingjia.cli import data as verb

    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("a slip")

    monkeypatch.setattr(verb, "print_report", fail)
    outcome = pingjia("data", "check", tmp_path)
    assert outcome.code == 1
    assert "internal error: ZeroDivisionError: a slip" in outcome.err
    assert "--debug" in outcome.err
    assert "Traceback" not in outcome.err
    outcome = pingjia("data", "check", tmp_path, debug=True)
    assert outcome.code == 1
    assert "Traceback" in outcome.err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 0)])
def test_interruptions(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    """In a process of its own: a broken pipe closes stdout for good."""
    script = (
        "from pingjia.cli import env, main\n"
        f"def fail(): raise {type(error).__name__}()\n"
        "import pingjia.cli.machine as machine; machine.describe = fail\n"
        "raise SystemExit(main.invoke(['env']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, os.strerror(28), "/data/x"), "/data/x: No space left on device"),
        (PermissionError(13, os.strerror(13), "/data/x"), "/data/x: Permission denied"),
        (ModuleNotFoundError("no torch", name="torch.nn"), "pip install 'pingjia[model]'"),
        (ModuleNotFoundError("no openai", name="openai"), "pip install 'pingjia[demo]'"),
    ],
)
def test_errors_of_the_system_are_the_users_to_correct(
    pingjia: Pingjia, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    from pingjia.cli import machine

    def fail() -> None:
        raise error

    monkeypatch.setattr(machine, "describe", fail)
    refused(pingjia("env"), words)


def test_debug_shows_the_traceback_anywhere_in_the_line() -> None:
    for line in (["--debug", "train", "nowhere.yaml"], ["train", "nowhere.yaml", "--debug"]):
        done = subprocess.run(
            [sys.executable, "-m", "pingjia.cli.main", *line], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "Traceback" in done.stderr
        assert "RecipeError" in done.stderr
        assert "error: nowhere.yaml: no such recipe" in done.stderr


def test_without_debug_there_is_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pingjia.cli.main", "train", "nowhere.yaml"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


VERBS = [[], ["run"], ["train"], ["eval"], ["quality"], ["exam"], ["serve"], ["chat"], ["export"],
         ["doctor"], ["env"], ["version"],
         ["data"], ["data", "check"], ["data", "prepare"], ["data", "tokenizer"],
         ["cost"], ["cost", "report"], ["cost", "compare"], ["cost", "estimate"], ["quantize"], ["gateway"], ["worker"],
         ["keys"], ["keys", "create"], ["keys", "list"], ["keys", "revoke"], ["keys", "show-usage"],
         ["cluster"], ["cluster", "nginx"], ["cluster", "status"], ["cluster", "drain"], ["cluster", "rollout"],
         ["cluster", "plan"]]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb) or "root")
def test_every_verb_has_help(pingjia: Pingjia, verb: list[str]) -> None:
    for flag in ("--help", "-h"):
        outcome = pingjia(*verb, flag)
        assert outcome.code == 0
        assert outcome.out.startswith("Usage: pingjia")
        assert not outcome.err


def test_the_list_of_verbs_is_complete() -> None:
    from typer.main import get_command

    root = get_command(main.app)
    found = {(): root} | {(name,): command for name, command in root.commands.items()}
    for name, command in root.commands.items():
        found |= {(name, sub): c for sub, c in getattr(command, "commands", {}).items()}
    assert set(found) == {tuple(verb) for verb in VERBS}


def test_help_and_version_load_no_torch() -> None:
    code = (
        "import sys; from pingjia.cli.main import invoke\n"
        "codes = [invoke(line) for line in (['--help'], ['serve', '--help'], ['version'])]\n"
        "print(codes, [m for m in ('torch', 'transformers', 'peft', 'fastapi', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0] []"
