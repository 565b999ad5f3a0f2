"""The encoder and BERTScore, against the package bert-score and against sentence-transformers' own recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pingjia.errors import ModelError
from pingjia.locate import locate_model
from pingjia.models import Encoder, load_encoder
from pingjia.similarity import Idf, bert_score

CANDIDATES = [
    "整机保修三年，压缩机保修十年。",
    "The kettle costs 129 yuan.",
    "我们每天上午九点开门，晚上九点关门，周末也一样。",
    "好的",
    "Delivery takes two days in the city and four days elsewhere, counted from the day of your order. " * 12,
]
REFERENCES = [
    "冰箱整机质保三年，压缩机质保十年。",
    "You pay 129 yuan for the kettle.",
    "门店营业时间是早九点到晚九点。",
    "可以，没问题。",
    "It arrives within two days in town; other places take four days.",
]


@pytest.fixture(scope="module")
def directory() -> Path:
    try:
        return locate_model("minilm")
    except ModelError as e:
        pytest.skip(f"the packaged encoder is needed: {e}")


@pytest.fixture(scope="module")
def encoder(directory: Path) -> Encoder:
    return load_encoder(directory)


@pytest.mark.parametrize("with_idf", [False, True])
@pytest.mark.parametrize("layer", [None, 3])
def test_scores_equal_those_of_bert_score(directory: Path, with_idf: bool, layer: int | None) -> None:
    theirs = pytest.importorskip("bert_score", reason="bert-score is not installed")
    from bert_score import scorer as scorer_module

    scorer = theirs.BERTScorer(
        model_type=str(directory), num_layers=layer or 6, idf=with_idf, idf_sents=REFERENCES, device="cpu"
    )
    scorer._tokenizer.model_max_length = 512  # it reads this; the packaged tokenizer says otherwise
    assert scorer_module
    expected = torch.stack(scorer.score(CANDIDATES, REFERENCES), dim=1).numpy()
    ours = load_encoder(directory, layer=layer)
    left, right = ours.token_vectors(CANDIDATES), ours.token_vectors(REFERENCES)
    idf = Idf(right) if with_idf else None
    scores = [bert_score(a, b, idf) for a, b in zip(left, right, strict=True)]
    np.testing.assert_allclose([[s.precision, s.recall, s.f1] for s in scores], expected, atol=1e-5)


def test_an_empty_text_scores_nothing(encoder: Encoder) -> None:
    empty, text = encoder.token_vectors(["", "你好"])
    assert bert_score(empty, text).f1 == bert_score(text, empty).f1 == bert_score(empty, empty).f1 == 0


def test_a_text_is_like_itself_and_more_like_its_paraphrase_than_another(encoder: Encoder) -> None:
    same, text, paraphrase, other = encoder.token_vectors(
        ["How long is the warranty?", "How long is the warranty?", "How long does the warranty last?", "I like rain."]
    )
    assert bert_score(same, text).f1 == pytest.approx(1, abs=1e-5)
    assert bert_score(text, paraphrase).f1 > bert_score(text, other).f1 + 0.2


def test_one_text_alone_and_among_others(encoder: Encoder) -> None:
    """Padding changes nothing, and the order is kept."""
    together = encoder.token_vectors(CANDIDATES)
    for text, vectors in zip(CANDIDATES, together, strict=True):
        (alone,) = encoder.token_vectors([text])
        assert alone.ids == vectors.ids
        np.testing.assert_allclose(alone.vectors, vectors.vectors, atol=1e-5)


def test_sentence_vectors_are_the_mean_of_all_tokens(encoder: Encoder, directory: Path) -> None:
    """As the model card of all-MiniLM-L6-v2 defines them: mean pooling with the mask, then unit length."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    for text, vector in zip(CANDIDATES[:4], encoder.sentence_vectors(CANDIDATES[:4]), strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = hidden.mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_a_layer_that_is_not_there(directory: Path) -> None:
    with pytest.raises(ModelError, match=r"layer 7: the encoder has layers 1-6"):
        load_encoder(directory, layer=7)


def test_a_directory_without_an_encoder(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"no encoder: a directory with config\.json"):
        load_encoder(tmp_path)
    with pytest.raises(ModelError, match=r"llama is no encoder|cannot be loaded as an encoder"):
        load_encoder(tiny_llama)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be loaded as an encoder"):
        load_encoder(tmp_path)
