"""A merged model is what was trained, or it is not written at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pingjia import Engine, Sampling
from pingjia.chat import golden_chats, load_tokenizer
from pingjia.data.settings import DataSettings
from pingjia.errors import ModelError, StorageError, TrainingError
from pingjia.export import ExportReport, merge_adapter
from pingjia.export import merge as module
from pingjia.models import added_tokens, load_model
from pingjia.models.settings import ModelSettings
from pingjia.tune import train
from pingjia.tune.settings import TuneSettings

PROMPTS = [[1, 50, 60, 70, 80, 90, 2], list(range(100, 140))]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A finished adapter of the tiny network that changes its answers by far more than rounding."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"prompt": "冰箱保修多久？", "response": "三年。"}, {"prompt": "How much is it?", "response": "129 yuan."}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    train(
        ModelSettings(model_name_or_path=str(tiny_llama), device="cpu"),
        DataSettings(dataset=str(folder / "rows.jsonl")),
        TuneSettings(output_dir=str(folder / "out"), lora_rank=4, lora_target="all", learning_rate=0.02, max_steps=6),
    )
    return folder / "out"


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(trained, tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*"))
    return tmp_path / "adapter"


@pytest.fixture
def merge(adapter: Path, tiny_llama: Path, tmp_path: Path) -> Callable[..., ExportReport]:
    def run(**changed: Any) -> ExportReport:
        tokenizer = load_tokenizer(tiny_llama)
        return merge_adapter(adapter, tmp_path / "merged", **{"save_tokenizer": tokenizer.save, **changed})

    return run


def logits(model: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits for ids in PROMPTS]


def nothing_left(tmp_path: Path) -> bool:
    return not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*.partial"))


def test_the_merged_model_answers_as_base_plus_adapter(
    merge: Callable[..., ExportReport], adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Both loaded by transformers and PEFT alone."""
    report = merge()
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    plain = logits(base)
    wanted = logits(PeftModel.from_pretrained(base, adapter).eval())
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval())
    for a, b, c in zip(got, wanted, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert (a - c).abs().max() > 0.1
    assert report.num_merged_modules == 21
    assert report.num_prompts >= 3
    assert report.max_logit_diff <= 1e-4
    assert report.max_change_from_base > 0.1
    written = json.loads((tmp_path / "merged" / "export_report.json").read_text())
    assert written["max_logit_diff"] == report.max_logit_diff
    assert not list((tmp_path / "merged").glob("adapter*"))


def test_the_tokenizer_goes_with_it(merge: Callable[..., ExportReport], tiny_llama: Path, tmp_path: Path) -> None:
    merge()
    ours, again = load_tokenizer(tiny_llama), load_tokenizer(tmp_path / "merged")
    chat = [{"role": "user", "content": "你好, world"}]
    assert again.render(chat) == ours.render(chat)
    assert again.template_digest == ours.template_digest
    theirs = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == ours.render(chat)


def test_another_base_is_refused(
    merge: Callable[..., ExportReport], make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_llama(9)
    with pytest.raises(ModelError, match="is not the base this adapter was trained on"):
        merge(base=other)
    assert nothing_left(tmp_path)


def test_the_same_base_in_another_place_is_taken(
    merge: Callable[..., ExportReport], tiny_llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "moved")
    assert merge(base=tmp_path / "moved").base == str(tmp_path / "moved")


def test_a_base_that_has_gone(merge: Callable[..., ExportReport], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        merge(base=tmp_path / "gone")


def test_an_adapter_that_changes_nothing_is_refused(
    merge: Callable[..., ExportReport], adapter: Path, tmp_path: Path
) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    zeroed = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors.items()}
    safetensors.torch.save_file(zeroed, file, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="equals the base model"):
        merge()
    assert nothing_left(tmp_path)


def test_what_exists_is_not_overwritten(merge: Callable[..., ExportReport], tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="exists; choose a new directory, nothing is overwritten"):
        merge()
    assert [p.name for p in (tmp_path / "merged").iterdir()] == ["mine.txt"]


def test_an_adapter_that_is_not_finished(merge: Callable[..., ExportReport], adapter: Path, tmp_path: Path) -> None:
    (adapter / "pingjia.json").unlink()
    with pytest.raises(ModelError, match="no finished adapter here"):
        merge()
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_is_incomplete_or_torn(
    merge: Callable[..., ExportReport], adapter: Path, tmp_path: Path, name: str
) -> None:
    content = (adapter / name).read_bytes()
    for spoilt in (content[: len(content) // 2], None):
        if spoilt is None:
            (adapter / name).unlink()
        else:
            (adapter / name).write_bytes(spoilt)
        with pytest.raises(ModelError, match="adapter"):
            merge()
        assert nothing_left(tmp_path)


def test_tensors_without_a_place_are_refused(merge: Callable[..., ExportReport], adapter: Path, tmp_path: Path) -> None:
    """PEFT alone passes them over in silence."""
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(n for n in tensors if "layers.1" in n)
    renamed = {n.replace("layers.1.", "layers.7.") if n == name else n: t for n, t in tensors.items()}
    safetensors.torch.save_file(renamed, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"2 adapter tensors have no place in this network or are missing"):
        merge()
    assert nothing_left(tmp_path)


def saving(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """Let `change` spoil what was saved before it is checked."""
    real = PreTrainedModel.save_pretrained

    def save(self: PreTrainedModel, folder: Path, **options: Any) -> None:
        real(self, folder, **options)
        change(Path(folder))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)


def test_saving_the_base_instead_is_noticed(
    merge: Callable[..., ExportReport], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving(monkeypatch, lambda folder: shutil.copy(tiny_llama / "model.safetensors", folder))
    with pytest.raises(ModelError, match=r"equals its base: the adapter was not merged"):
        merge()
    assert nothing_left(tmp_path)


def test_one_weight_that_differs_is_noticed(
    merge: Callable[..., ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        tensors["model.layers.2.mlp.down_proj.weight"] *= 1.05
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    saving(monkeypatch, spoil)
    with pytest.raises(ModelError, match="does not answer as the adapter did"):
        merge()
    assert nothing_left(tmp_path)


def test_a_merge_that_did_nothing_is_noticed(
    merge: Callable[..., ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "max_diff", lambda left, right: 0.0)
    with pytest.raises(ModelError, match="equals its base: the adapter was not merged"):
        merge()
    assert nothing_left(tmp_path)


def test_a_full_disk(merge: Callable[..., ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: PreTrainedModel, folder: Path, **options: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(StorageError, match="the disk is full"):
            merge()
    assert nothing_left(tmp_path)
    assert merge().stored_bytes > 1e6


def test_half_precision_has_its_own_tolerance(merge: Callable[..., ExportReport], tmp_path: Path) -> None:
    report = merge(dtype="bfloat16")
    assert report.tolerance == module.TOLERANCE[torch.bfloat16]
    tensors = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


# ---- rows of new tokens


@pytest.mark.parametrize("is_tied", [True, False])
def test_trained_rows_of_new_tokens_are_merged(
    extended_llama: Callable[[bool], Path], tmp_path: Path, is_tied: bool
) -> None:
    """The merged model answers as base plus adapter does in the engine, in new tokens too."""
    base, rows = extended_llama(is_tied), tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "冰箱保修多久？", "response": "整机保修三十六个月。"}), encoding="utf-8")
    train(
        ModelSettings(model_name_or_path=str(base), device="cpu"),
        DataSettings(dataset=str(rows)),
        TuneSettings(
            output_dir=str(tmp_path / "out"),
            lora_rank=4,
            lora_target="all",
            learning_rate=0.05,
            max_steps=8,
            train_new_tokens=True,
        ),
    )
    tokenizer = load_tokenizer(base)
    report = merge_adapter(tmp_path / "out", tmp_path / "merged", save_tokenizer=tokenizer.save)
    assert report.num_prompts == len(golden_chats(tokenizer)) + 1, "and one of all new tokens"
    unmerged, merged = Engine(base, adapter=tmp_path / "out"), Engine(tmp_path / "merged")
    asked = [[{"role": "user", "content": text}] for text in ("冰箱保修多久？", "电话", "hello")]
    sampling = Sampling(max_tokens=16)
    answers = [[a.token_ids for a in e.generate(asked, sampling)] for e in (unmerged, merged)]
    assert answers[0] == answers[1]
    assert answers[0] != [a.token_ids for a in unmerged.generate(asked, sampling, adapter=None)]
    assert max(token for answer in answers[0] for token in answer) >= tokenizer.vocab_size - 120


def test_rows_that_were_not_merged_are_noticed(
    extended_llama: Callable[[bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the golden chats holds the token; the proof runs over all new ones."""
    base, rows = extended_llama(False), tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "冰箱保修多久？", "response": "三十六个月。"}), encoding="utf-8")
    train(
        ModelSettings(model_name_or_path=str(base), device="cpu"),
        DataSettings(dataset=str(rows)),
        TuneSettings(output_dir=str(tmp_path / "out"), learning_rate=0.05, max_steps=3, train_new_tokens=True),
    )
    tokenizer = load_tokenizer(base)
    said = {token for chat in golden_chats(tokenizer) for token in chat["ids"]}
    token = next(t for t in added_tokens(load_model(base).config) if t not in said)

    def spoil(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"][token] += 1
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    saving(monkeypatch, spoil)
    with pytest.raises(ModelError, match="does not answer as the adapter did"):
        merge_adapter(tmp_path / "out", tmp_path / "merged", save_tokenizer=tokenizer.save)
