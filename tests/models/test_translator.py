"""Translation model directories: a random MarianMT and a random M2M100, made here, through the real loading code."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from pingjia.errors import ModelError
from pingjia.models.translator import SeqTranslator, load_translator

TEXTS = ["怎么退货，多久能退款", "请问冰箱保修几年", "how do i return it", "the fridge has a warranty"]
SHAPE = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}


def _pieces() -> tuple[bytes, list[str]]:
    """A SentencePiece model learnt from TEXTS, and its pieces without the special ones."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=model, vocab_size=70, hard_vocab_limit=False, minloglevel=2
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    return model.getvalue(), [p for p in pieces if p not in ("<unk>", "<s>", "</s>")]


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import MarianConfig, MarianMTModel

    directory = tmp_path_factory.mktemp("marian")
    model, pieces = _pieces()
    vocab = {piece: i for i, piece in enumerate(["</s>", "<unk>", *pieces, "<pad>"])}
    for name in ("source.spm", "target.spm"):
        (directory / name).write_bytes(model)
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    tokenizer = {
        "tokenizer_class": "MarianTokenizer",
        "source_lang": "zho",
        "target_lang": "eng",
        "model_max_length": 64,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    pad = vocab["<pad>"]
    ends = {"pad_token_id": pad, "eos_token_id": 0, "decoder_start_token_id": pad, "forced_eos_token_id": 0}
    torch.manual_seed(0)
    MarianMTModel(MarianConfig(vocab_size=len(vocab), **SHAPE, **ends)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def translator(marian: Path) -> SeqTranslator:
    return load_translator(marian, device="cpu")


def _teach_to_end(translator: SeqTranslator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights never end by themselves; this makes the end likely after a few tokens."""
    model = translator._model
    forward = model.forward

    def ending(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        past = kwargs.get("past_key_values")
        out.logits[..., 0] += 100.0 if past is not None and past.get_seq_length() > 5 else -100.0
        return out

    monkeypatch.setattr(model, "forward", ending)


def test_one_translation_per_text_in_order(translator: SeqTranslator, monkeypatch: pytest.MonkeyPatch) -> None:
    _teach_to_end(translator, monkeypatch)
    together = translator.translate(TEXTS)
    assert all(isinstance(t, str) and t for t in together)
    assert together == [translator.translate([text])[0] for text in TEXTS]  # padding changes nothing
    assert translator.translate([]) == []


def test_batches_do_not_change_the_order(marian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, many = load_translator(marian, device="cpu", batch_size=1), load_translator(marian, device="cpu", batch_size=3)
    for each in (one, many):
        _teach_to_end(each, monkeypatch)
    texts = ["请问", TEXTS[0], "几年", TEXTS[3], "多久"]
    assert one.translate(texts) == many.translate(texts)


def test_a_translation_without_end_is_an_error(translator: SeqTranslator, monkeypatch: pytest.MonkeyPatch) -> None:
    model = translator._model
    forward = model.forward

    def endless(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits[..., 0] -= 100.0
        return out

    monkeypatch.setattr(model, "forward", endless)
    (answer,) = translator.translate(["怎么退货"])
    assert isinstance(answer, ModelError)
    assert "did not end within" in str(answer)


def test_a_text_too_long_is_an_error_and_the_others_pass(
    translator: SeqTranslator, monkeypatch: pytest.MonkeyPatch
) -> None:
    _teach_to_end(translator, monkeypatch)
    answers = translator.translate(["怎么退货", "怎么退货" * 40, "多久"])
    assert isinstance(answers[0], str)
    assert isinstance(answers[2], str)
    assert isinstance(answers[1], ModelError)
    assert "the translation model takes 64" in str(answers[1])


def test_a_model_of_another_kind_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="llama is no translation model"):
        load_translator(tiny_llama)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        load_translator(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_translator(tmp_path)


def test_a_directory_without_its_tokenizer(marian: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((marian / name).read_bytes())
    with pytest.raises(ModelError, match="cannot be loaded as a translation model"):
        load_translator(tmp_path)


@pytest.fixture(scope="module")
def m2m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import M2M100Config, M2M100ForConditionalGeneration, M2M100Tokenizer

    directory = tmp_path_factory.mktemp("m2m")
    model, pieces = _pieces()
    vocab = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces])}
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (directory / "sentencepiece.bpe.model").write_bytes(model)
    tokenizer = M2M100Tokenizer(str(directory / "vocab.json"), str(directory / "sentencepiece.bpe.model"))
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    M2M100ForConditionalGeneration(M2M100Config(vocab_size=len(tokenizer) + 300, **SHAPE)).save_pretrained(directory)
    return directory


def test_a_multilingual_model_is_told_the_languages(m2m: Path) -> None:
    translator = load_translator(m2m, "zh", "en", device="cpu")
    tokenizer = translator._tokenizer
    assert tokenizer.src_lang == "zh"
    assert tokenizer.convert_ids_to_tokens(translator._first_token) == "__en__"
    assert len(translator.translate(["怎么退货"])) == 1


def test_a_language_that_it_has_not(m2m: Path) -> None:
    with pytest.raises(ModelError, match="has no language 'klingon'"):
        load_translator(m2m, "zh", "klingon", device="cpu")
