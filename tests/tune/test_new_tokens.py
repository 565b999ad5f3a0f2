"""Rows of new tokens learn beside LoRA, in PEFT's own format; nothing else of the tables moves."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pingjia.chat import load_tokenizer
from pingjia.errors import TrainingError
from pingjia.models import added_tokens, family_of, load_model, use_packed_attention
from pingjia.models.attention import PackedSequences
from pingjia.tune import Hooks
from pingjia.tune.lora import add_adapter, resolve_targets
from pingjia.tune.settings import PhaseSettings, TuneSettings
from pingjia.tune.step import build_batch, summed_loss
from pingjia.types import Example, Message

Extended = Callable[[bool], Path]
EMBEDDING = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
QUESTION = [{"role": "user", "content": "冰箱保修多久？客服电话"}]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_rows_are_in_the_adapter_and_have_learnt(
    tune: Callable[..., Any], extended_llama: Extended, tmp_path: Path, is_tied: bool
) -> None:
    base = extended_llama(is_tied)
    tune(model=base, train_new_tokens=True)
    saved, table = adapter(tmp_path / "out"), load_model(base).get_input_embeddings().weight
    tokens = added_tokens(load_model(base).config)
    rows = {name for name in saved if "token_adapter" in name}
    assert rows == ({EMBEDDING} if is_tied else {EMBEDDING, HEAD})
    assert saved[EMBEDDING].shape == (120, 64)
    used = {i for i in load_tokenizer(base).render(QUESTION) if i in tokens}
    assert used
    for token in used:
        assert not torch.equal(saved[EMBEDDING][token - tokens[0]], table[token]), token
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    names = {"model.embed_tokens"} if is_tied else {"model.embed_tokens", "lm_head"}
    assert config["trainable_token_indices"] == {name: tokens for name in names}


@pytest.mark.parametrize("is_tied", [True, False])
def test_plain_peft_loads_it_and_only_new_rows_have_moved(
    tune: Callable[..., Any], extended_llama: Extended, tmp_path: Path, is_tied: bool
) -> None:
    base = extended_llama(is_tied)
    tune(model=base, train_new_tokens=True)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tables = {n: p.detach().clone() for n, p in plain.named_parameters() if "embed" in n or "head" in n}
    ids = torch.tensor([load_tokenizer(base).render(QUESTION)])
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
        after = theirs(input_ids=ids).logits
        merged = theirs.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, after, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-3
    first = added_tokens(plain.config)[0]
    for name, table in tables.items():
        now = merged.get_parameter(name)
        assert torch.equal(now[:first], table[:first])
        assert not torch.equal(now[first:], table[first:])


@pytest.mark.parametrize("is_tied", [True, False])
def test_packed_rows_give_the_gradient_of_single_ones(extended_llama: Extended, is_tied: bool) -> None:
    """Against autograd on the plain network whose whole tables learn: the new rows of its gradients."""
    base = extended_llama(is_tied)
    tokenizer = load_tokenizer(base)
    rows = [
        tokenizer.encode_example(Example((Message("user", q), Message("assistant", a))))
        for q, a in [("冰箱保修多久？", "整机保修三十六个月。"), ("可以开发票吗？", "可以。")]
    ]
    settings = TuneSettings(output_dir="-", lora_target="all", train_new_tokens=True, lora_dropout=0)
    model = load_model(base)
    adapted = add_adapter(model, resolve_targets(model, family_of(model), settings), settings)
    use_packed_attention(model)
    batch = build_batch(rows, family_of(model), model.config, model.device)
    summed_loss(adapted, batch).backward()
    ours = {n: p.grad for n, p in adapted.named_parameters() if "trainable_tokens_delta" in n}

    plain = load_model(base)
    tables = {EMBEDDING: plain.get_input_embeddings().weight, HEAD: plain.get_output_embeddings().weight}
    for row in rows:
        logits = plain(input_ids=torch.tensor([row.ids])).logits[0, :-1]
        learnt = torch.tensor(row.learn[1:])
        loss = torch.nn.functional.cross_entropy(logits[learnt], torch.tensor(row.ids[1:])[learnt], reduction="sum")
        loss.backward()
    first = added_tokens(plain.config)[0]
    assert set(ours) == {f"{n}.default" for n in (EMBEDDING, HEAD)[: 1 if is_tied else 2]}
    for name, grad in ours.items():
        assert grad is not None
        wanted = tables[name.removesuffix(".default")].grad
        assert wanted is not None
        torch.testing.assert_close(grad, wanted[first:], rtol=1e-4, atol=1e-5)
        assert grad.abs().max() > 0.01


def test_a_stopped_run_goes_on_to_the_same_rows(
    tune: Callable[..., Any], extended_llama: Extended, tmp_path: Path
) -> None:
    base = extended_llama(True)
    tune(model=base, train_new_tokens=True, output_dir=str(tmp_path / "whole"))
    steps = iter([False, False, False, True])
    stopped = tune(model=base, train_new_tokens=True, hooks=Hooks(should_stop=lambda: next(steps, False)))
    assert not stopped.finished
    assert tune(model=base, train_new_tokens=True).finished
    whole, resumed = adapter(tmp_path / "whole"), adapter(tmp_path / "out")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [None, 8])
def test_other_ways_of_training_take_the_rows_along(
    tune: Callable[..., Any], extended_llama: Extended, tmp_path: Path, bits: int | None
) -> None:
    tune(
        model=extended_llama(True),
        quantization_bit=bits,
        train_new_tokens=True,
        gradient_checkpointing=True,
        lora_target="",
        phases=[PhaseSettings(target=["attention"], max_steps=2), PhaseSettings(target=["ffn"], max_steps=2)],
        layer_learning_rates={"1-3": 1e-3, "other": 1e-2},
        save_steps=1,
        save_total_limit=4,
    )
    saved = [adapter(tmp_path / "out" / f"checkpoint-{step:06d}")[EMBEDDING] for step in (1, 2, 3, 4)]
    for before, after in pairwise(saved):
        assert not torch.equal(before, after), "new tokens learn in every phase"


def test_without_the_key_rows_stay_as_they_are(
    tune: Callable[..., Any], extended_llama: Extended, tmp_path: Path
) -> None:
    tune(model=extended_llama(True))
    assert not any("token_adapter" in name for name in adapter(tmp_path / "out"))


def test_a_base_without_new_tokens_is_refused(tune: Callable[..., Any]) -> None:
    with pytest.raises(TrainingError, match=r"train_new_tokens: no tokens were added to this model's vocabulary"):
        tune(train_new_tokens=True)


def test_the_embedding_is_not_trained_in_two_ways(tune: Callable[..., Any], extended_llama: Extended) -> None:
    with pytest.raises(TrainingError, match=r"trains rows of model.embed_tokens whole; take it out of lora_target"):
        tune(model=extended_llama(True), train_new_tokens=True, lora_target="attention,embedding")


def test_new_rows_are_seen_by_packed_attention(
    tune: Callable[..., Any], extended_llama: Extended, tmp_path: Path
) -> None:
    """Our forward pass over the adapter equals PEFT's on plain attention."""
    base = extended_llama(False)
    tune(model=base, train_new_tokens=True)
    ids = torch.tensor([load_tokenizer(base).render(QUESTION)])
    with torch.no_grad():
        plain = PeftModel.from_pretrained(load_model(base), tmp_path / "out").eval()
        wanted = plain(input_ids=ids).logits
        model = load_model(base)
        packed = PeftModel.from_pretrained(model, tmp_path / "out").eval()
        use_packed_attention(model)
        got = packed(
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1])[None],
            packed=PackedSequences.of([ids.shape[1]]),
            use_cache=False,
        ).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
