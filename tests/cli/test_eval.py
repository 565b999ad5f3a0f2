"""The encoder of `pingjia eval`: loaded only where it is asked for, and named where it cannot read the answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pingjia.cli import eval as verb
from pingjia.errors import ModelError
from pingjia.evaluate import EvalSettings
from pingjia.locate import locate_model
from pingjia.types import Example, Message

DEVICE = "cpu"


def question(answer: str) -> Example:
    return Example((Message("user", "q"), Message("assistant", answer)))


@pytest.fixture
def minilm() -> None:
    try:
        locate_model("minilm")
    except ModelError as e:
        pytest.skip(f"the packaged encoder is needed: {e}")


def test_no_encoder_is_loaded_for_other_metrics() -> None:
    assert verb._encoder(DEVICE, EvalSettings(encoder="/nowhere"), [question("a")]) is None


def test_an_encoder_that_is_not_there_is_known_before_anything_is_asked() -> None:
    with pytest.raises(ModelError, match="/nowhere"):
        verb._encoder(DEVICE, EvalSettings(encoder="/nowhere", metrics=["bert_score"]), [question("a")])


@pytest.mark.usefixtures("minilm")
@pytest.mark.parametrize(("answer", "is_known"), [("The kettle costs 129 yuan.", True), ("冰箱整机保修三年。", False)])
def test_an_encoder_that_cannot_read_the_answers_is_named(
    answer: str, is_known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = verb._encoder(DEVICE, EvalSettings(metrics=["bert_score"], encoder_layer=3), [question(answer)])
    assert encoder is not None
    said = " ".join(capsys.readouterr().err.split())
    assert ("the encoder minilm does not know" in said) != is_known


def test_a_model_and_its_rival_without_a_recipe(pingjia: Any, tiny_llama: Any, write_rows: Any, tmp_path: Any) -> None:
    file = write_rows([{"prompt": "冰箱保修多久？", "response": "36个月。", "facts": ["36个月"]}] * 2)
    out = tmp_path / "out"
    line = ["eval", tiny_llama, f"questions={file}", "max_tokens=4", "metrics=[rouge_l, token_probability]"]
    alone = pingjia(*line, "--out", out)
    assert alone.code == 0, alone.err
    assert "perplexity" in alone.out
    assert (out / "report.json").is_file()
    both = pingjia(*line, "--against", tiny_llama, "--out", out, "--json")
    assert both.code == 0, both.err
    found = json.loads(both.out)
    assert found["overall"]["token_probability"]["difference"] == 0
    assert found["perplexity"]["before"] == found["perplexity"]["after"] > 1
    assert (out / "comparison.html").is_file()


def test_a_server_cannot_say_how_likely_an_answer_is(pingjia: Any, write_rows: Any) -> None:
    file = write_rows([{"prompt": "冰箱保修多久？", "response": "36个月。"}])
    line = ["eval", "http://127.0.0.1:9/v1#m", f"questions={file}", "metrics=token_probability"]
    refused = pingjia(*line)
    assert refused.code == 2
    assert "which a server does not give" in refused.err
    assert pingjia("eval", "http://127.0.0.1:9/v1", f"questions={file}").code == 2
    assert "eval.questions: missing" in pingjia("eval", "smollm2").err
