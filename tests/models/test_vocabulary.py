"""A model with more rows is the base in every byte it had, and its new rows are means of the base's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pingjia.errors import ModelError, StorageError
from pingjia.locate import locate_model
from pingjia.models import base_fingerprint, load_model, vocabulary
from pingjia.models.vocabulary import ADDED, AddedRows, added_tokens, extend_model, mean_rows

SIZE = 49_152  # rows of the tiny network: SmolLM2's vocabulary
PIECES = [(50, 60), (70,), (80, 90, 100), (50, 60, 70, 80)]
ROWS = AddedRows(SIZE, PIECES, "digest")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MakeLlama = Callable[..., Path]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in directory.glob("*.safetensors") for n, t in safetensors.torch.load_file(file).items()}


def config(directory: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return values


def require_grown(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], tables: set[str]) -> None:
    assert set(after) == set(before)
    for name, tensor in before.items():
        if name in tables:
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name][:SIZE], tensor[:SIZE])
            wanted = torch.stack([tensor[list(p)].float().mean(0) for p in PIECES]).to(tensor.dtype)
            assert torch.equal(after[name][SIZE : SIZE + 4], wanted)
        else:
            assert torch.equal(after[name], tensor)


@pytest.mark.parametrize("is_tied", [True, False])
def test_old_rows_stay_and_new_ones_are_means(make_llama: MakeLlama, out: Path, is_tied: bool) -> None:
    base = make_llama(0, tie_word_embeddings=is_tied)
    grown = extend_model(base, out, ROWS)
    require_grown(tensors(base), tensors(out), {EMBEDDING} if is_tied else {EMBEDDING, HEAD})
    assert (grown.num_rows_before, grown.num_rows, grown.is_tied) == (SIZE, SIZE + 4, is_tied)
    assert grown.stored_bytes == sum(p.stat().st_size for p in out.iterdir())
    assert config(out) == config(base) | {
        "vocab_size": SIZE + 4,
        ADDED: {"first": SIZE, "count": 4, "sha256": "digest"},
    }


def test_old_tokens_are_computed_as_before(make_llama: MakeLlama, out: Path) -> None:
    base = make_llama(0)
    extend_model(base, out, ROWS)
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    with torch.no_grad():
        before, after = load_model(base)(input_ids=ids).logits, load_model(out)(input_ids=ids).logits
        new = load_model(out)(input_ids=torch.tensor([[1, SIZE, SIZE + 3]])).logits
    torch.testing.assert_close(after[..., :SIZE], before, rtol=1e-6, atol=1e-6)
    assert new.shape[-1] == SIZE + 4
    assert new.isfinite().all()


def test_shards_and_half_precision(tiny_llama: Path, tmp_path: Path, out: Path) -> None:
    base = tmp_path / "shards"
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size="6MB")
    index = "model.safetensors.index.json"
    extend_model(base, out, ROWS)
    require_grown(tensors(base), tensors(out), {EMBEDDING})
    before, after = json.loads((base / index).read_text()), json.loads((out / index).read_text())
    assert len(set(before["weight_map"].values())) > 1
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"] + 4 * 64 * 2
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == SIZE + 4


def test_rows_in_reserve_are_used_first(make_llama: MakeLlama, out: Path, tmp_path: Path) -> None:
    base = make_llama(0, vocab_size=SIZE + 3)
    assert extend_model(base, out, ROWS).num_rows == SIZE + 4
    require_grown(tensors(base), tensors(out), {EMBEDDING})
    roomy = make_llama(0, vocab_size=SIZE + 10)
    (tmp_path / "roomy").mkdir()
    grown = extend_model(roomy, tmp_path / "roomy", ROWS)
    assert grown.num_rows == grown.num_rows_before == SIZE + 10
    before, after = tensors(roomy), tensors(tmp_path / "roomy")
    require_grown(before, after, {EMBEDDING})
    assert torch.equal(after[EMBEDDING][SIZE + 4 :], before[EMBEDDING][SIZE + 4 :])
    load_model(tmp_path / "roomy")


@pytest.mark.parametrize("is_tied", [True, False])
def test_pickled_weights_are_saved_as_safetensors(
    make_llama: MakeLlama, tmp_path: Path, out: Path, is_tied: bool
) -> None:
    base, plain = make_llama(0, tie_word_embeddings=is_tied), tmp_path / "pickled"
    shutil.copytree(base, plain)
    state = safetensors.torch.load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    torch.save(state, plain / "pytorch_model.bin")
    grown = extend_model(plain, out, ROWS)
    require_grown(tensors(base), tensors(out), {EMBEDDING} if is_tied else {EMBEDDING, HEAD})
    assert (grown.num_rows, grown.is_tied) == (SIZE + 4, is_tied)
    assert added_tokens(load_model(out).config) == list(range(SIZE, SIZE + 4))


def test_a_gguf_file(out: Path) -> None:
    try:
        locate_model("smollm2")
    except ModelError as e:
        pytest.skip(f"the packaged model is needed: {e}")
    extend_model("smollm2", out, ROWS)
    base = load_model("smollm2")
    before = {n: p.detach() for n, p in base.named_parameters()}
    require_grown(before, tensors(out), {EMBEDDING})


def test_means_are_taken_in_float32() -> None:
    table = torch.tensor([[1.0], [2.0**-9], [2.0**-9]], dtype=torch.bfloat16)
    wanted = torch.tensor([[(1 + 2.0**-8) / 3]]).to(torch.bfloat16)
    assert torch.equal(mean_rows(table, [(0, 1, 2)]), wanted)


# ---- not taken for the base


def test_its_fingerprint_is_another(make_llama: MakeLlama, out: Path, tmp_path: Path) -> None:
    base = make_llama(0)
    extend_model(base, out, ROWS)
    (tmp_path / "other").mkdir()
    extend_model(base, tmp_path / "other", AddedRows(SIZE, PIECES, "another digest"))
    prints = [base_fingerprint(load_model(d)) for d in (base, out, tmp_path / "other")]
    assert len(set(prints)) == 3
    load_model(out).save_pretrained(tmp_path / "again")
    assert base_fingerprint(load_model(tmp_path / "again")) == prints[1]


def test_a_published_model_has_no_added_tokens(tiny_llama: Path) -> None:
    assert added_tokens(load_model(tiny_llama).config) == []


# ---- what cannot be extended


def test_a_tokenizer_of_another_model(tiny_llama: Path, out: Path) -> None:
    with pytest.raises(
        ModelError, match=r"has 49,152 rows, but its tokenizer counts 60,000 tokens; these files do not"
    ):
        extend_model(tiny_llama, out, AddedRows(60_000, PIECES, "x"))


def test_chatglm_is_not_touched(out: Path, saved: Callable[..., Path], v2: Any) -> None:
    with pytest.raises(ModelError, match="chatglm"):
        extend_model(saved(v2), out, AddedRows(96, PIECES, "x"))


def test_a_checkpoint_without_its_embedding(tiny_llama: Path, tmp_path: Path, out: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    state = tensors(base)
    del state[EMBEDDING]
    safetensors.torch.save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight is missing"):
        extend_model(base, out, ROWS)


def test_a_packed_embedding(tiny_llama: Path, tmp_path: Path, out: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    state = tensors(base)
    state[EMBEDDING] = state[EMBEDDING].to(torch.int8)
    safetensors.torch.save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"is stored as torch.int8; extend the float checkpoint"):
        extend_model(base, out, ROWS)


def test_a_truncated_file(tiny_llama: Path, tmp_path: Path, out: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot be read, perhaps truncated"):
        extend_model(base, out, ROWS)


def test_a_disk_without_room_is_known_beforehand(tiny_llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (tiny_llama / "model.safetensors").stat().st_size + 4 * 64 * 4
    for free in (size - 1, size):
        monkeypatch.setattr(vocabulary.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        if free < size:
            with pytest.raises(StorageError, match=r"takes 0\.0 GB and 0\.0 GB are free where it would be written"):
                extend_model(tiny_llama, out, ROWS)
            assert not list(out.iterdir())
        else:
            extend_model(tiny_llama, out, ROWS)


def test_a_disk_that_refuses_a_loaded_model(
    tiny_llama: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    torch.save(tensors(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()

    def full(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(StorageError, match="No space left on device"):
        extend_model(base, out, ROWS)
