"""The kinds of LoRA: each trains, and what is saved computes what was trained, in plain PEFT on the untouched base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pingjia.errors import TrainingError
from pingjia.models import load_model
from pingjia.tune import Hooks
from pingjia.tune.journal import read_log

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa-ranks": {"init_lora_weights": "pissa", "lora_rank_pattern": {"1": 2}},
    "lora+": {"loraplus_lr_ratio": 16},
    "ranks": {"lora_rank_pattern": {"1-2": 2}},
    "embedding": {"lora_target": "embedding,attention"},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 50, 60, 70, 80, 90, 2]])).logits


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_saved_is_what_was_trained(tune: Callable, tiny_llama: Path, tmp_path: Path, name: str) -> None:
    """The last loss of the run, computed again by plain PEFT over the saved files, is that of the network in memory."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "可以开发票吗？", "response": "可以，当天开。"}, ensure_ascii=False))
    result = tune(**VARIANTS[name], data={"eval_dataset": [str(held_out)]}, learning_rate=5e-3)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    before = logits(plain)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    assert (logits(theirs) - before).abs().max() > 1e-3
    assert loss_of(theirs, held_out) == pytest.approx(result.eval_loss, rel=1e-5)


def loss_of(model: PeftModel, file: Path) -> float:
    from pingjia.chat import load_tokenizer
    from pingjia.data import encode_examples, read_examples

    tokenizer = load_tokenizer(model.base_model.model.config._name_or_path)
    (row,), _ = encode_examples(read_examples([file], on_problem=print), tokenizer, 1024)
    labels = [i if learnt else -100 for i, learnt in zip(row.ids, row.learn, strict=True)]
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([labels])).loss)


def test_pissa_leaves_as_a_plain_lora_of_twice_the_rank(tune: Callable, tmp_path: Path) -> None:
    tune(init_lora_weights="pissa", lora_target="q_proj", lora_rank=4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    tensors = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {8}


def test_pissa_goes_on_after_a_stop(tune: Callable, tmp_path: Path) -> None:
    whole = tune(init_lora_weights="pissa", output_dir=str(tmp_path / "whole"))
    seen: list[int] = []
    stop = Hooks(on_step=lambda log: seen.append(log.step), should_stop=lambda: seen[-1] >= 3)
    assert not tune(init_lora_weights="pissa", hooks=stop).finished
    assert tune(init_lora_weights="pissa").last_loss == whole.last_loss
    left, right = (tmp_path / n / "adapter_model.safetensors" for n in ("whole", "out"))
    assert left.read_bytes() == right.read_bytes()


def test_pissa_begins_where_the_base_is(tune: Callable, tmp_path: Path) -> None:
    """Taking weights apart changes nothing yet: the first loss is that of plain LoRA, which begins at the base."""
    firsts = []
    for init in ("default", "pissa"):
        tune(init_lora_weights=init, output_dir=str(tmp_path / init), max_steps=1, lora_dropout=0.0)
        firsts.append(read_log(tmp_path / init / "trainer_log.jsonl")[0].loss)
    assert firsts[0] == pytest.approx(firsts[1], rel=1e-4)


def test_pissa_on_packed_weights_is_refused(tune: Callable, tiny_llama: Path) -> None:
    assert load_model(tiny_llama, bits=4) is not None
    with pytest.raises(
        TrainingError, match=r"init_lora_weights pissa takes the base's weights apart, and .* are packed"
    ):
        tune(init_lora_weights="pissa", quantization_bit=4)


@pytest.mark.parametrize("bits", [4, 8])
def test_dora_on_packed_weights_is_refused(tune: Callable, bits: int) -> None:
    with pytest.raises(TrainingError, match=r"use_dora reads the base's weights as floats, and 21 of them are packed"):
        tune(use_dora=True, quantization_bit=bits)


def test_lora_plus_moves_b_faster(tune: Callable, tmp_path: Path) -> None:
    for ratio in (1, 16):
        tune(loraplus_lr_ratio=ratio, max_steps=1, warmup_ratio=0.0, output_dir=str(tmp_path / str(ratio)))
    moved = [
        max(t.abs().max().item() for n, t in tensors.items() if "lora_B" in n)
        for tensors in (safetensors.torch.load_file(tmp_path / r / "adapter_model.safetensors") for r in ("1", "16"))
    ]
    assert moved[1] == pytest.approx(16 * moved[0], rel=1e-3)
