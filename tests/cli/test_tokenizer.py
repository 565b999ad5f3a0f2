"""`pingjia data tokenizer`: what it writes can be trained, served and exported; what it cannot do, it says."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import yaml

from pingjia import Engine, Sampling
from pingjia.chat import load_tokenizer
from pingjia.cli.schema import load_recipe
from pingjia.data import read_examples
from pingjia.models import vocabulary

Pingjia = Callable[..., Any]
SAMPLE = "samples:customer_service.jsonl"


def refused(outcome: Any, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err, outcome.err


def untouched(folder: Path) -> bool:
    return not (folder / "out").exists() and not list(folder.glob(".*.partial"))


@pytest.fixture
def many_rows(write_rows: Callable[..., Path]) -> Path:
    return write_rows([{"prompt": f"冰箱保修多久？{i}", "response": "整机保修三十六个月。"} for i in range(20)])


# ---- with a base


def test_the_whole_road(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path) -> None:
    """Extend, train as the recipe beside the model says, serve, export, serve again."""
    out, files = tmp_path / "out", [SAMPLE, "samples:writing.jsonl"]
    made = pingjia("data", "tokenizer", *files, "--base", tiny_llama, "--add", 200, "--out", out)
    assert made.code == 0, made.err
    assert "200 tokens added to" in made.out
    assert "49,352 rows in its embedding (before 49,152)" in made.out
    assert "must be trained: pingjia train" in made.out
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "recipe.yaml", "tokenizer.json",
        "tokenizer_config.json", "vocabulary.json",
    ]  # fmt: skip
    recipe = load_recipe(out / "recipe.yaml")
    assert recipe.tune.train_new_tokens
    assert recipe.model.model_name_or_path == str(out)
    assert recipe.data.dataset == files

    trained = pingjia(
        "train", out / "recipe.yaml", "max_steps=4", "learning_rate=0.05", f"output_dir={tmp_path / 'run'}"
    )
    assert trained.code == 0, trained.err
    exported = pingjia("export", tmp_path / "run", "--out", tmp_path / "merged")
    assert exported.code == 0, exported.err
    asked, sampling = [[{"role": "user", "content": "冰箱保修多久？"}]], Sampling(max_tokens=12)
    adapted = Engine(out, adapter=tmp_path / "run").generate(asked, sampling)
    assert Engine(tmp_path / "merged").generate(asked, sampling)[0].token_ids == adapted[0].token_ids
    assert Engine(out).generate(asked, sampling)[0].token_ids != adapted[0].token_ids


def test_the_figures_are_true(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = pingjia("data", "tokenizer", SAMPLE, "--base", tiny_llama, "--out", out, "--eval", "samples:tutoring.jsonl")
    record = json.loads((out / "vocabulary.json").read_text(encoding="utf-8"))
    examples = read_examples(["samples:tutoring.jsonl"], on_problem=lambda problem: None)
    texts = [message.content for example in examples for message in example.messages]
    before, after = (sum(len(t.encode(x)) for x in texts) for t in map(load_tokenizer, (tiny_llama, out)))
    assert record["unseen"]["num_before"] == before
    assert record["unseen"]["num_after"] == after < before
    assert f"held out: {record['unseen']['num_characters'] / before:.2f} -> " in made.out
    assert record["eval_files"] == ["samples:tutoring.jsonl"]
    assert record["num_rows"] == 160, "nothing is held out of the files to learn from"
    assert load_recipe(out / "recipe.yaml").data.eval_dataset == ["samples:tutoring.jsonl"]
    first = load_tokenizer(tiny_llama).vocab_size
    assert [t["id"] for t in record["tokens"]] == list(range(first, first + len(record["tokens"])))
    readme = (out / "README.md").read_text(encoding="utf-8")
    assert f"{before:,} | {after:,}" in readme


def test_vocab_size_counts_the_bases_tokens(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path) -> None:
    made = pingjia("data", "tokenizer", SAMPLE, "--base", tiny_llama, "--vocab-size", 49_200, "--out", tmp_path / "out")
    assert made.code == 0, made.err
    assert load_tokenizer(tmp_path / "out").vocab_size == 49_200


def test_a_small_corpus_gives_what_there_is(
    pingjia: Pingjia, tiny_llama: Path, tmp_path: Path, many_rows: Path
) -> None:
    made = pingjia("data", "tokenizer", many_rows, "--base", tiny_llama, "--out", tmp_path / "out")
    assert made.code == 0, made.err
    found = load_tokenizer(tmp_path / "out").vocab_size - 49_152
    assert 0 < found < 60
    assert f"the corpus gives {found} tokens, not 2,000: nothing more occurs 5 times" in made.out


def test_an_extended_model_can_be_extended(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path) -> None:
    for base, out, add in ((tiny_llama, "one", 50), (tmp_path / "one", "two", 30)):
        made = pingjia("data", "tokenizer", SAMPLE, "--base", base, "--add", add, "--out", tmp_path / out)
        assert made.code == 0, made.err
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["vocab_size"] == 49_232
    assert (config["added_vocabulary"]["first"], config["added_vocabulary"]["count"]) == (49_202, 30)


def test_bad_rows_are_counted(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path, many_rows: Path) -> None:
    many_rows.write_text(many_rows.read_text(encoding="utf-8") + "not json\n", encoding="utf-8")
    made = pingjia("data", "tokenizer", many_rows, "--base", tiny_llama, "--out", tmp_path / "out")
    assert "learnt from 18 rows; 1 bad rows passed over" in made.out


# ---- without one


def test_a_fresh_vocabulary(pingjia: Pingjia, tmp_path: Path) -> None:
    made = pingjia("data", "tokenizer", SAMPLE, "--out", tmp_path / "out", "--vocab-size", 600)
    assert made.code == 0, made.err
    assert "600 tokens in" in made.out
    assert "held out: " in made.out
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == 600
    assert tokenizer.decode(tokenizer.encode("冰箱 😀")) == "冰箱 😀"
    assert len(tokenizer.render([{"role": "user", "content": "冰箱"}])) > 5


def test_few_rows_leave_nothing_to_measure_on(
    pingjia: Pingjia, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    file = write_rows([{"prompt": "冰箱保修", "response": "三年"}])
    made = pingjia("data", "tokenizer", file, "--out", tmp_path / "out", "--vocab-size", 600, "--min-frequency", 2)
    assert made.code == 0, made.err
    assert "held out: no rows to measure on" in made.out


# ---- what is refused


def test_an_out_that_exists(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for base in (["--base", tiny_llama], []):
        refused(
            pingjia("data", "tokenizer", SAMPLE, *base, "--out", tmp_path / "out"),
            "exists; choose a new directory, nothing is overwritten",
        )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--add", "0", "--base", "smollm2"], "'--add': Input should be greater than or equal to 1"),
        (["--add", "10"], "--add is for --base MODEL"),
        (["--add", "10", "--vocab-size", "50000", "--base", "smollm2"], "give one of them"),
        (["--vocab-size", "49152", "--base", "smollm2"], "the base has 49,152 tokens"),
        (["--base", "nowhere"], "nowhere: no such model directory"),
        (["--min-frequency", "1"], "'--min-frequency': Input should be greater than or equal to 2"),
    ],
)
def test_options_that_cannot_be_obeyed(pingjia: Pingjia, tmp_path: Path, options: list[str], message: str) -> None:
    refused(pingjia("data", "tokenizer", SAMPLE, "--out", tmp_path / "out", *options), message)
    assert untouched(tmp_path)


@pytest.mark.parametrize("has_base", [True, False])
def test_a_corpus_without_a_row(
    pingjia: Pingjia, tiny_llama: Path, tmp_path: Path, write_rows: Callable[..., Path], has_base: bool
) -> None:
    options = ["--base", str(tiny_llama)] if has_base else []
    bad = write_rows([{"nothing": "known"}])
    refused(pingjia("data", "tokenizer", bad, "--out", tmp_path / "out", *options), "no text to learn from")
    refused(pingjia("data", "tokenizer", tmp_path / "gone.jsonl", "--out", tmp_path / "out", *options), "no such file")
    assert untouched(tmp_path)


def test_nothing_chinese_to_add(
    pingjia: Pingjia, tiny_llama: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    file = write_rows([{"prompt": "How much?", "response": "129 yuan."}] * 20)
    refused(
        pingjia("data", "tokenizer", file, "--base", tiny_llama, "--out", tmp_path / "out"), "there is nothing to add"
    )
    assert untouched(tmp_path)


def test_a_base_without_a_bpe(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    made.save(str(base / "tokenizer.json"))
    refused(
        pingjia("data", "tokenizer", SAMPLE, "--base", base, "--out", tmp_path / "out"),
        "this vocabulary cannot be extended: it is a Unigram, not a BPE",
    )
    assert untouched(tmp_path)


def test_a_full_disk(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "_copy", full)
        outcome = pingjia("data", "tokenizer", SAMPLE, "--base", tiny_llama, "--out", tmp_path / "out")
    refused(outcome, "not written: No space left on device; make room")
    assert untouched(tmp_path)


def test_the_recipe_is_complete_and_strict(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path) -> None:
    pingjia("data", "tokenizer", SAMPLE, "--base", tiny_llama, "--add", 20, "--out", tmp_path / "out")
    raw = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8"))
    assert raw["train_new_tokens"] is True
    assert raw["learning_rate"] == 1e-3
