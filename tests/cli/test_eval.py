"""The encoder of `pingjia eval`: loaded only where it is asked for, and named where it cannot read the answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pingjia.cli import eval as verb
from pingjia.errors import ModelError
from pingjia.evaluate import EvalSettings
from pingjia.locate import locate_model
from pingjia.types import Example, Message

RECIPE: Any = SimpleNamespace(model=SimpleNamespace(device="cpu"))


def question(answer: str) -> Example:
    return Example((Message("user", "q"), Message("assistant", answer)))


@pytest.fixture
def minilm() -> None:
    try:
        locate_model("minilm")
    except ModelError as e:
        pytest.skip(f"the packaged encoder is needed: {e}")


def test_no_encoder_is_loaded_for_other_metrics() -> None:
    assert verb._encoder(RECIPE, EvalSettings(encoder="/nowhere"), [question("a")]) is None


def test_an_encoder_that_is_not_there_is_known_before_anything_is_asked() -> None:
    with pytest.raises(ModelError, match="/nowhere"):
        verb._encoder(RECIPE, EvalSettings(encoder="/nowhere", metrics=["bert_score"]), [question("a")])


@pytest.mark.usefixtures("minilm")
@pytest.mark.parametrize(("answer", "is_known"), [("The kettle costs 129 yuan.", True), ("冰箱整机保修三年。", False)])
def test_an_encoder_that_cannot_read_the_answers_is_named(
    answer: str, is_known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = verb._encoder(RECIPE, EvalSettings(metrics=["bert_score"], encoder_layer=3), [question(answer)])
    assert encoder is not None
    said = " ".join(capsys.readouterr().err.split())
    assert ("the encoder minilm does not know" in said) != is_known
