"""`pingjia quantize`: a directory that every verb takes, its proof, and every bad input in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pingjia.models import base_fingerprint, load_model
from pingjia.models.compare import Tally
from pingjia.quant import shards
from pingjia.quant.group import GroupInt4Linear
from tests.cli.test_errors import refused

Pingjia = Callable[..., Any]
QUICK = ("--calibration-tokens", 400, "--group-size", 32)
HELD = ("--verify", "--held-out-tokens", 300)


@pytest.fixture
def int4(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path) -> Path:
    outcome = pingjia("quantize", tiny_llama, "--out", tmp_path / "int4", *QUICK)
    assert outcome.code == 0, outcome
    return tmp_path / "int4"


def test_a_directory_with_everything_in_it(int4: Path, tiny_llama: Path) -> None:
    record = json.loads((int4 / "quantization.json").read_text())
    config = json.loads((int4 / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "pingjia",
        "version": 1,
        "bits": 4,
        "group_size": 32,
        "method": "gptq",
        "head_bits": 8,
        "act_order": True,
        "damping": 0.01,
        "layout": "group",
    }
    assert record["source"]["model"] == str(tiny_llama)
    assert record["source"]["fingerprint"] == base_fingerprint(load_model(tiny_llama))
    assert record["calibration"]["files"][0] == "samples:customer_service.jsonl"
    assert record["calibration"]["tokens"] >= 400
    assert len(record["matrices"]) == 3 * 7 + 1
    assert (int4 / "tokenizer.json").is_file()
    assert sorted(p.name for p in int4.parent.iterdir()) == ["int4"]
    assert not list(int4.glob("*.tmp")) + list(int4.glob("shard-*")) + list(int4.glob("inputs.json"))


def test_the_proof_is_printed(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path) -> None:
    outcome = pingjia("quantize", tiny_llama, "--out", tmp_path / "q", *QUICK, *HELD, "--max-perplexity-loss", 1)
    assert outcome.code == 0, outcome
    for word in ("perplexity", "KL, nats", "same top-1", "model.layers.2", "bits per weight", "calibration text:"):
        assert word in outcome.out
    figures = json.loads((tmp_path / "q" / "quantization.json").read_text())["held_out"]
    assert figures["perplexity_packed"] > 0
    assert 0 <= figures["top1_agreement"] <= 1
    assert [b["block"] for b in figures["blocks"]] == [f"model.layers.{i}" for i in range(3)]


def test_a_program_reads_the_report(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path) -> None:
    outcome = pingjia("quantize", tiny_llama, "--out", tmp_path / "q", "--method", "rtn", "--bits", 8, "--json")
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    assert report["stored_bytes"] == sum(f.stat().st_size for f in (tmp_path / "q").glob("*.safetensors"))
    assert {m["bits"] for m in report["matrices"]} == {8}


def test_a_loss_over_the_limit_is_left_aside(
    pingjia: Pingjia, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tally, "perplexity_loss", property(lambda _: 0.2))  # random weights may gain by rounding
    outcome = pingjia("quantize", tiny_llama, "--out", tmp_path / "q", *HELD, "--method", "rtn")
    said = outcome.err.strip().splitlines()[-1]
    assert outcome.code == 2
    assert said.startswith("error: perplexity ")
    assert "+20.00%, over the 15.00% allowed; left in" in said
    assert not (tmp_path / "q").exists()
    assert (tmp_path / "q.refused" / "quantization.json").is_file()
    assert not (tmp_path / "q.partial").exists()


# ---- the other verbs take it


def test_the_engine_answers_with_it(int4: Path) -> None:
    from pingjia import Engine, Sampling

    (answer,) = Engine(int4).generate("你好", Sampling(max_tokens=4))
    assert answer.finish_reason in ("length", "stop")


def test_an_adapter_trains_over_it_and_one_of_the_float_base_fits_it(
    pingjia: Pingjia, int4: Path, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [tmp_path / "run-float", tmp_path / "run-int4"]
    for run, model in zip(runs, (None, int4), strict=True):
        changed = {"output_dir": str(run)} | ({"model_name_or_path": str(model)} if model else {})
        outcome = pingjia("train", recipe(f"{run.name}.yaml", **changed))
        assert outcome.code == 0, outcome
    prints = {json.loads((run / "pingjia.json").read_text())["base"]["fingerprint"] for run in runs}
    assert prints == {base_fingerprint(load_model(int4))}
    from pingjia import Engine, Sampling

    assert Engine(int4, adapter=runs[0]).generate("冰箱保修多久？", Sampling(max_tokens=2))


def test_an_adapter_is_never_merged_into_packed_weights(
    pingjia: Pingjia, int4: Path, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    assert pingjia("train", recipe()).code == 0
    outcome = pingjia("export", tmp_path / "out", "--out", tmp_path / "merged", "--base", int4)
    refused(outcome, "packed to 4 bits", "pingjia quantize", "--adapter")
    assert not (tmp_path / "merged").exists()


def test_merge_then_quantise_is_a_way_of_its_own_with_the_same_proof(
    pingjia: Pingjia, tiny_llama: Path, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    assert pingjia("train", recipe()).code == 0
    outcome = pingjia(
        "quantize", tiny_llama, "--out", tmp_path / "q", "--adapter", tmp_path / "out", *QUICK, "--held-out-tokens", 300
    )
    assert outcome.code == 0, outcome
    assert "merged 21 modules" in outcome.out
    assert "same top-1" in outcome.out
    record = json.loads((tmp_path / "q" / "quantization.json").read_text())
    assert record["source"]["adapter"] == str(tmp_path / "out")
    assert not (tmp_path / "q.merged").exists()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        merged, base = (load_model(d)(ids).logits for d in (tmp_path / "q", tiny_llama))
    assert float((merged - base).abs().max()) > 0.01


# ---- interrupted, full, damaged


def test_a_full_disk_leaves_nothing_that_loads_and_the_next_run_goes_on(
    pingjia: Pingjia, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = shards.save_file, []

    def full_at_the_third(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise shards.SafetensorError("I/O error: No space left on device (os error 28)")
        real(*args, **kwargs)

    monkeypatch.setattr(shards, "save_file", full_at_the_third)
    command = ("quantize", tiny_llama, "--out", tmp_path / "q", *QUICK)
    outcome = pingjia(*command)
    said = outcome.err.strip().splitlines()[-1]
    assert outcome.code == 2
    assert "was not written: the disk is full. Finished shards wait in" in said
    assert not (tmp_path / "q").exists()
    assert not (tmp_path / "q.partial" / "config.json").exists()
    again = pingjia(*command)
    assert again.code == 0, again
    assert "2 shards of an interrupted run were kept" in again.out
    assert isinstance(load_model(tmp_path / "q").model.layers[0].mlp.up_proj, GroupInt4Linear)


def test_shards_of_other_settings_are_not_kept(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path) -> None:
    partial = tmp_path / "q.partial"
    partial.mkdir()
    (partial / "inputs.json").write_text("other")
    (partial / "model-00001-of-00004.safetensors").write_bytes(b"old")
    (partial / "shard-1.json").write_text("{}")
    outcome = pingjia("quantize", tiny_llama, "--out", tmp_path / "q", "--method", "rtn")
    assert outcome.code == 0, outcome
    load_model(tmp_path / "q")


def test_a_folder_that_is_not_ours_is_not_removed(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "q.partial").mkdir()
    (tmp_path / "q.partial" / "thesis.tex").write_text("years of work")
    outcome = pingjia("quantize", tiny_llama, "--out", tmp_path / "q", "--method", "rtn", "--json")
    refused(outcome, "is in the way and is not of an unfinished run")
    assert (tmp_path / "q.partial" / "thesis.tex").is_file()


def test_no_room(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("pingjia.export.quantize.shutil.disk_usage", lambda _: usage._replace(free=1000))
    outcome = pingjia("quantize", tiny_llama, "--out", tmp_path / "q", "--method", "rtn", "--json")
    refused(outcome, "the packed model takes about", "make room")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["chat", "serve"])
def test_a_flipped_byte(pingjia: Pingjia, int4: Path, verb: str) -> None:
    file = sorted(int4.glob("*.safetensors"))[1]
    good = file.read_bytes()
    file.write_bytes(good[:-3] + bytes([good[-3] ^ 64]) + good[-2:])
    options = ("--port", 0) if verb == "serve" else ()
    outcome = pingjia(verb, int4, *options)
    last = outcome.err.strip().splitlines()[-1]
    refused(outcome._replace(err=last), "model.layers.1.", "is not as it was written (its checksum differs)")


# ---- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", 3), "bits 3: choose 4 or 8"),
        (("--group-size", 100), "group size 100: choose 32, 64 or 128"),
        (("--method", "awq"), "method awq: choose gptq or rtn"),
        (("--head-bits", 2), "head bits 2: choose 4, 8 or 16"),
        (("--layout", "published", "--method", "rtn", "--head-bits", 16), "only ChatGLM has a published layout"),
        (("--held-out", "x.jsonl"), "are for --verify"),
        (("--max-perplexity-loss", 0.1), "are for --verify"),
        (("--calibration", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--calibration", "samples:nothing.jsonl"), "no such sample"),
        (("--verify", "--held-out", "samples:writing.jsonl"), "is the calibration text samples:writing.jsonl"),
    ],
)
def test_bad_options(
    pingjia: Pingjia, tiny_llama: Path, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    outcome = pingjia("quantize", tiny_llama, "--out", tmp_path / "q", "--json", *options)
    refused(outcome, words)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_the_calibration_text_is_no_held_out_text(
    pingjia: Pingjia, tiny_llama: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    rows = [{"prompt": "你好", "response": "你好！"}]
    first, second = write_rows(rows, "a.jsonl"), write_rows(rows, "b.jsonl")
    outcome = pingjia(
        "quantize",
        tiny_llama,
        "--out",
        tmp_path / "q",
        "--json",
        "--calibration",
        first,
        "--verify",
        "--held-out",
        second,
    )
    refused(outcome, "b.jsonl is the calibration text", "give another --held-out")


def test_bad_places(pingjia: Pingjia, tiny_llama: Path, int4: Path, tmp_path: Path) -> None:
    refused(pingjia("quantize", "nowhere", "--out", tmp_path / "q"), "nowhere: no such model directory")
    refused(pingjia("quantize", tiny_llama, "--out", int4), "exists; choose a new directory")
    outcome = pingjia("quantize", int4, "--out", tmp_path / "q", "--method", "rtn", "--json")
    refused(outcome, "packed to 4 bits already; give the float checkpoint")


def test_plain_text_calibrates_too(pingjia: Pingjia, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "novel.txt"
    file.write_text("天下大势，分久必合，合久必分。\n" * 200, encoding="utf-8")
    outcome = pingjia("quantize", tiny_llama, "--out", tmp_path / "q", *QUICK, "--calibration", file)
    assert outcome.code == 0, outcome
    assert json.loads((tmp_path / "q" / "quantization.json").read_text())["calibration"]["rows"] == 1
