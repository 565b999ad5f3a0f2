"""The encoder and BERTScore, against the package bert-score and against sentence-transformers' own recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, RobertaConfig, RobertaModel

from pingjia.errors import ModelError
from pingjia.locate import locate_model
from pingjia.models import Encoder, load_encoder
from pingjia.models import encoder as module
from pingjia.similarity import Idf, Score, bert_score, bert_scores

CANDIDATES = [
    "整机保修三年，压缩机保修十年。",
    "The kettle costs 129 yuan.",
    "我们每天上午九点开门，晚上九点关门，周末也一样。",
    "好的",
    "  Why?\n",
    "Delivery takes two days in the city and four days elsewhere, counted from the day of your order.",
    "青禾 fridge，型号 QH-36 [SEP] 保修😀",
]
REFERENCES = [
    "冰箱整机质保三年，压缩机质保十年。",
    "You pay 129 yuan for the kettle.",
    "门店营业时间是早九点到晚九点。",
    "可以，没问题。",
    "For what reason?",
    "It arrives within two days in town; other places take four days.",
    "The fridge QH-36 comes with a warranty of 36 months.",
]
LONG = "Delivery takes two days, and four days if the house stands outside the city. " * 40
TEXTS = [*CANDIDATES, LONG]
PAIRS = list(zip(CANDIDATES, REFERENCES, strict=True))


@pytest.fixture(scope="module")
def directory() -> Path:
    try:
        return locate_model("minilm")
    except ModelError as e:
        pytest.skip(f"the packaged encoder is needed: {e}")


@pytest.fixture(scope="module")
def encoder(directory: Path) -> Encoder:
    return load_encoder(directory)


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return pytest.importorskip("bert_score", reason="bert-score is not installed")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RoBERTa with 64 places and a vocabulary of bytes."""
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = BpeTrainer(vocab_size=400, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CANDIDATES + REFERENCES, trainer)
    tokenizer.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer", "model_max_length": 64}')
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = RobertaConfig(vocab_size=400, max_position_embeddings=66, pad_token_id=1, initializer_range=0.2, **shape)
    RobertaModel(config).save_pretrained(folder)
    return folder


def as_table(scores: list[Score]) -> list[list[float]]:
    return [[s.precision, s.recall, s.f1] for s in scores]


# ---- BERTScore


@pytest.mark.parametrize("with_idf", [False, True])
@pytest.mark.parametrize("layer", [None, 3])
def test_scores_equal_those_of_bert_score(
    theirs: ModuleType, directory: Path, with_idf: bool, layer: int | None
) -> None:
    scorer = theirs.BERTScorer(
        model_type=str(directory), num_layers=layer or 6, idf=with_idf, idf_sents=REFERENCES, device="cpu", nthreads=0
    )
    scorer._tokenizer.model_max_length = 512
    expected = torch.stack(scorer.score(CANDIDATES, REFERENCES), dim=1).numpy()
    ours = load_encoder(directory, layer=layer)
    left, right = ours.token_vectors(CANDIDATES), ours.token_vectors(REFERENCES)
    idf = Idf.of(right) if with_idf else None
    scores = [bert_score(a, b, idf) for a, b in zip(left, right, strict=True)]
    np.testing.assert_allclose(as_table(scores), expected, atol=1e-5)


def test_both_read_512_tokens(theirs: ModuleType, directory: Path) -> None:
    scorer = theirs.BERTScorer(model_type=str(directory), num_layers=1, device="cpu")
    scorer._tokenizer.model_max_length = 512
    expected = torch.stack(scorer.score([LONG], REFERENCES[:1]), dim=1).numpy()
    ours = bert_scores([(LONG, REFERENCES[0])], load_encoder(directory, layer=1))
    np.testing.assert_allclose(as_table(ours), expected, atol=1e-5)


def test_rescaled_scores_equal_those_of_bert_score(
    theirs: ModuleType, directory: Path, encoder: Encoder, tmp_path: Path
) -> None:
    table = "LAYER,P,R,F\n" + "".join(f"{layer},0.61,0.52,0.57\n" for layer in range(7))
    (tmp_path / "baseline.tsv").write_text(table)
    scorer = theirs.BERTScorer(
        model_type=str(directory),
        num_layers=6,
        lang="zh",
        rescale_with_baseline=True,
        baseline_path=str(tmp_path / "baseline.tsv"),
        device="cpu",
    )
    expected = torch.stack(scorer.score(CANDIDATES[:4], REFERENCES[:4]), dim=1).numpy()
    ours = [score.rescaled(Score(0.61, 0.52, 0.57)) for score in bert_scores(PAIRS[:4], encoder)]
    np.testing.assert_allclose(as_table(ours), expected, atol=1e-5)


def test_scores_of_a_roberta_equal_those_of_bert_score(theirs: ModuleType, roberta: Path) -> None:
    scorer = theirs.BERTScorer(model_type=str(roberta), num_layers=2, device="cpu")
    # It asks for a space before the first word in a way that transformers 5 does not hear.
    scorer._tokenizer = AutoTokenizer.from_pretrained(roberta, add_prefix_space=True)
    expected = torch.stack(scorer.score(CANDIDATES, REFERENCES), dim=1).numpy()
    np.testing.assert_allclose(as_table(bert_scores(PAIRS, load_encoder(roberta, layer=2))), expected, atol=1e-5)


def test_many_pairs_are_scored_in_their_order(encoder: Encoder) -> None:
    pairs = [(a, b) for a in CANDIDATES for b in REFERENCES]  # more than are encoded at once
    scores = bert_scores(pairs, encoder)
    for i in (0, 8, 20, 48):
        assert as_table([scores[i]])[0] == pytest.approx(as_table(bert_scores([pairs[i]], encoder))[0], abs=1e-5)


def test_an_empty_text_scores_nothing(encoder: Encoder) -> None:
    empty, blank, text = encoder.token_vectors(["", " \n", "你好"])
    assert bert_score(empty, text).f1 == bert_score(text, blank).f1 == bert_score(empty, empty).f1 == 0
    assert encoder.token_vectors([]) == []
    assert encoder.sentence_vectors([]).shape == (0, 384)


def test_a_text_is_like_itself_and_more_like_its_paraphrase_than_another(encoder: Encoder) -> None:
    same, text, paraphrase, other = encoder.token_vectors(
        ["How long is the warranty?", "How long is the warranty?", "How long does the warranty last?", "I like rain."]
    )
    assert bert_score(same, text).f1 == pytest.approx(1, abs=1e-5)
    assert bert_score(text, paraphrase).f1 > bert_score(text, other).f1 + 0.2


# ---- vectors


def test_one_text_alone_and_among_others(encoder: Encoder) -> None:
    """Padding changes nothing, and the order is kept."""
    together = encoder.token_vectors(TEXTS)
    for text, vectors in zip(TEXTS, together, strict=True):
        (alone,) = encoder.token_vectors([text])
        assert alone.ids == vectors.ids
        np.testing.assert_allclose(alone.vectors, vectors.vectors, atol=1e-5)


def test_vectors_do_not_hold_their_batch(encoder: Encoder) -> None:
    assert all(v.vectors.base is None for v in encoder.token_vectors(CANDIDATES))


@given(st.lists(st.integers(1, 512), max_size=60), st.integers(1, 32))
def test_batches_hold_every_text_once_and_little_padding(sizes: list[int], batch_size: int) -> None:
    batches = list(module._batches(sizes, batch_size))
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len(batch) * max(sizes[i] for i in batch) <= module._MAX_BATCH_TOKENS


def test_sentence_vectors_are_the_mean_of_the_first_256_tokens(encoder: Encoder, directory: Path) -> None:
    """As the model card of all-MiniLM-L6-v2 and its sentence_bert_config.json define them."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    for text, vector in zip(TEXTS, encoder.sentence_vectors(TEXTS), strict=True):
        with torch.no_grad():
            ids = tokenizer(text.strip(), return_tensors="pt", truncation=True, max_length=256)
            mean = model(**ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_sentence_vectors_do_not_depend_on_the_layer_that_is_compared(directory: Path, encoder: Encoder) -> None:
    third = load_encoder(directory, layer=3)
    np.testing.assert_allclose(third.sentence_vectors(["你好"]), encoder.sentence_vectors(["你好"]), atol=1e-6)


def test_the_first_token_stands_for_the_text_where_the_directory_says_so(roberta: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(roberta, tmp_path / "pooled")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    pooled = load_encoder(folder)
    (tokens,) = pooled.token_vectors(["the kettle"])
    np.testing.assert_allclose(pooled.sentence_vectors(["the kettle"])[0], tokens.vectors[0], atol=1e-6)


def test_how_much_an_encoder_does_not_know(encoder: Encoder, roberta: Path) -> None:
    """Why a Chinese encoder is needed for Chinese: this one knows 244 characters."""
    assert encoder.unknown_share(["How long is the warranty?"]) == 0
    assert encoder.unknown_share(["冰箱保修多久？"]) > 0.5
    assert encoder.unknown_share([]) == encoder.unknown_share([""]) == 0
    (vectors,) = encoder.token_vectors(["冰箱保修多久？"])
    assert vectors.unknown == encoder.unknown_share(["冰箱保修多久？"])
    assert load_encoder(roberta).unknown_share(["冰箱"]) == 0


# ---- what is refused


def test_a_text_may_be_cut_short(directory: Path, encoder: Encoder) -> None:
    (whole,) = encoder.token_vectors([LONG])
    (short,) = load_encoder(directory, max_length=16).token_vectors([LONG])
    assert (len(whole.ids), len(short.ids)) == (512, 16)
    assert short.is_mark.tolist() == [True, *[False] * 14, True]


def test_a_roberta_has_fewer_places_than_its_table(roberta: Path) -> None:
    (vectors,) = load_encoder(roberta).token_vectors(["冰箱 " * 200])
    assert len(vectors.ids) == 64
    with pytest.raises(ModelError, match="max_length 65: the encoder reads 3 to 64 tokens"):
        load_encoder(roberta, max_length=65)


def test_a_layer_that_is_not_there(directory: Path) -> None:
    with pytest.raises(ModelError, match=r"layer 7: the encoder has layers 1-6"):
        load_encoder(directory, layer=7)


def test_a_causal_network_is_no_encoder(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="llama is no encoder: BERTScore needs a network such as BERT or RoBERTa"):
        load_encoder(tiny_llama)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "is_decoder": true}')
    with pytest.raises(ModelError, match="bert is no encoder"):
        load_encoder(tmp_path)


def _without_tokenizer(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).unlink()


def _with_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _with_half_of_the_weights(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def _with_other_weights(folder: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=400, **shape)).save_pretrained(folder / "other")
    shutil.copy(folder / "other" / "model.safetensors", folder / "model.safetensors")


def _with_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_with_pickle, r"no weights: \*\.safetensors is needed; convert its \.bin"),
        (_with_half_of_the_weights, "cannot be loaded as an encoder"),
        (
            _with_other_weights,
            r"not the weights of this encoder: \d+ tensors are missing or of another shape, first \w",
        ),
        (_with_code, "mine is no encoder"),
        (_without_tokenizer, r"no tokenizer: tokenizer\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
    ],
)
def test_a_directory_without_an_encoder(
    roberta: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = shutil.copytree(roberta, tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load_encoder(folder)


def test_a_file_is_no_encoder() -> None:
    with pytest.raises(ModelError, match="no encoder"):
        load_encoder("smollm2")
