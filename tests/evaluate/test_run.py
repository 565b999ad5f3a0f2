"""Asking and scoring, with a generator that answers from a list."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pingjia.errors import DataError, RecipeError
from pingjia.evaluate import EvalSettings, evaluate, select
from pingjia.evaluate.run import language
from pingjia.recipe import Section, build
from pingjia.similarity import Vectors
from pingjia.types import Example, Likelihood, Message, Sampling


def test_rows_scores_and_groups(ask, scripted) -> None:
    questions = [
        ask("冰箱保修多久？", "保修36个月。", where="a.jsonl:1", domain="售后", facts=("36个月",)),
        ask("能退货吗？", "15天内可退。", where="a.jsonl:2", domain="退货", facts=("15天",)),
        ask("Where are you?", "In Beijing.", where="a.jsonl:3", lang="en"),
    ]
    generator = scripted(["保修36个月。", "30天内可退。", "In Beijing."])
    seen = []
    report = evaluate(questions, generator, EvalSettings(), on_done=lambda i, c: seen.append((i, c.text)))

    assert generator.prompts == [question.prompt for question in questions]
    assert generator.sampling == Sampling(max_tokens=96, temperature=0.0)
    assert seen == [(0, "保修36个月。"), (1, "30天内可退。"), (2, "In Beijing.")]
    assert [row.where for row in report.rows] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert report.rows[1].missing_facts == ("15天",)
    assert report.overall.count == 3
    assert report.overall.scores["exact_facts"].mean == 0.5
    assert report.overall.scores["exact_facts"].count == 2
    assert report.domains["售后"].scores["exact_facts"].mean == 1.0
    assert report.domains["(no domain)"].count == 1
    assert {name: group.count for name, group in report.languages.items()} == {"en": 1, "zh": 2}
    assert report.languages["en"].scores["rouge_l"].mean == 1.0


def test_mean_is_the_mean_of_the_rows(ask, scripted) -> None:
    questions = [ask(f"问题{i}", "甲 乙 丙 丁") for i in range(4)]
    report = evaluate(questions, scripted(["甲", "甲 乙", "甲 乙 丙", "戊"]), EvalSettings(metrics=["rouge_1"]))
    scores = [row.scores["rouge_1"] for row in report.rows]
    assert report.overall.scores["rouge_1"].mean == pytest.approx(sum(scores) / 4)
    assert scores[3] == 0.0
    assert scores[0] < scores[1] < scores[2]


def test_cut_and_failed_answers_are_scored_and_counted(ask, scripted) -> None:
    question = ask("保修多久？", "36个月", facts=("36个月",))
    cut = evaluate([question], scripted(["36个月"], finish_reason="length"), EvalSettings(max_tokens=5))
    assert (cut.overall.num_cut, cut.overall.num_failed) == (1, 0)
    assert cut.overall.scores["exact_facts"].mean == 1.0
    assert "1 cut at max_tokens" in cut.lines()[0]
    failed = evaluate([question], scripted([""], finish_reason="error"), EvalSettings())
    assert (failed.overall.num_cut, failed.overall.num_failed) == (0, 1)
    assert "1 FAILED" in failed.lines()[0]


def test_a_reference_is_preferred_to_the_response(ask, scripted) -> None:
    report = evaluate([ask("q", "wrong", reference="right")], scripted(["right"]), EvalSettings(metrics=["rouge_1"]))
    assert report.rows[0].expected == "right"
    assert report.overall.scores["rouge_1"].mean == 1.0


def test_a_metric_without_any_value_is_named(ask, scripted) -> None:
    report = evaluate([ask("q", "a")], scripted(["a"]), EvalSettings())
    assert "exact_facts" not in report.overall.scores
    assert any(line.startswith("exact_facts: not scored") for line in report.lines())


def test_what_it_took_becomes_a_fact(ask, scripted) -> None:
    report = evaluate([ask("q", "a"), ask("r", "b")], scripted(["a", "b"]), EvalSettings())
    fact = report.fact("eval.before", run="r1")
    assert (fact.kind, fact.run, fact.seconds) == ("eval.before", "r1", report.seconds)
    assert (fact.prompt_tokens, fact.completion_tokens, fact.cached_tokens, fact.num_requests) == (14, 6, 4, 2)


def test_a_limit_spreads_over_the_whole_list(ask) -> None:
    questions = [ask(str(i), "a") for i in range(10)]
    assert [q.prompt[0].content for q in select(questions, 4)] == ["0", "2", "5", "7"]
    assert select(questions, None) == select(questions, 99) == questions


def test_a_limit_limits_what_is_asked(ask, scripted) -> None:
    report = evaluate([ask(str(i), "a") for i in range(10)], scripted(["a"] * 10), EvalSettings(max_questions=3))
    assert report.overall.count == 3


BROKEN = {
    "without a prompt": Example((Message("assistant", "a"),), "f.jsonl:7"),
    "blank": Example((Message("user", "q"), Message("assistant", "a")), "f.jsonl:7", facts=(" ",)),
    "text only": Example((Message("user", "q"), Message("assistant", "a")), "f.jsonl:7", images=("x.png",)),
    "without any": Example((Message("user", "q"), Message("assistant", "a")), "f.jsonl:7", tools=('{"name": "f"}',)),
    "nothing to score": Example((Message("user", "q"), Message("assistant", " ")), "f.jsonl:7"),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_question_that_cannot_be_scored_stops_before_generating(ask, scripted, reason: str) -> None:
    generator = scripted(["a", "a"])
    with pytest.raises(DataError, match=reason) as caught:
        evaluate([ask("q", "a"), BROKEN[reason]], generator, EvalSettings())
    assert str(caught.value).startswith("f.jsonl:7: ")
    assert generator.prompts == []


class OneWord:
    """An encoder to which all texts are one and the same word."""

    def token_vectors(self, texts: Sequence[str]) -> list[Vectors]:
        return [Vectors((1,), np.ones((1, 1), np.float32), np.array([False])) for _ in texts]

    def sentence_vectors(self, texts: Sequence[str]) -> np.ndarray:
        raise NotImplementedError


def test_bert_score_asks_the_encoder_it_is_given(ask, scripted) -> None:
    settings = EvalSettings(metrics=["bert_score", "rouge_l"], encoder="models/x", encoder_layer=8)
    report = evaluate([ask("q", "a")], scripted(["b"]), settings, encoder=OneWord())
    assert report.rows[0].scores == {"bert_score": 1.0, "rouge_l": 0.0}
    assert report.encoder == "models/x, layer 8"
    assert report.lines()[0].startswith("overall: 1 questions, bert_score 100.0")


def test_bert_score_without_an_encoder_stops_before_generating(ask, scripted) -> None:
    generator = scripted(["a"])
    with pytest.raises(RecipeError, match="bert_score needs an encoder"):
        evaluate([ask("q", "a")], generator, EvalSettings(metrics=["bert_score"]))
    assert generator.prompts == []


def test_other_metrics_name_no_encoder(ask, scripted) -> None:
    assert evaluate([ask("q", "a")], scripted(["a"]), EvalSettings()).encoder == ""


def test_no_questions(scripted) -> None:
    with pytest.raises(DataError, match="no questions"):
        evaluate([], scripted([]), EvalSettings())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("你好 hello", "zh"), ("What does 保修 mean in this sentence", "en"), ("123", "zh")],
)
def test_language_is_guessed_from_the_script(ask, text: str, expected: str) -> None:
    assert language(ask(text, "")) == expected


class Wrapper(Section):
    eval: EvalSettings


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"metrics": ["rouge_L"]}, "did you mean rouge_l"),
        ({"metrics": []}, "at least 1 item"),
        ({"metrics": ["rouge_l", "rouge_l"]}, "named twice"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"encoder_layer": 0}, "encoder_layer"),
        ({"max_question": 3}, "max_question: unknown key"),
    ],
)
def test_settings_are_strict(section: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build({"eval": section}, Wrapper, flat=())


def test_one_file_may_be_given_without_a_list() -> None:
    assert EvalSettings(questions="samples:customer_service.jsonl").questions == ["samples:customer_service.jsonl"]


def test_perplexity_of_the_expected_answers(ask: Callable[..., Example], scripted: type) -> None:
    class Knowing:
        def likelihoods(self, prompts, answers, *, with_end=True, on_done=None):  # type: ignore[no-untyped-def]
            assert with_end
            return [Likelihood(-2.0 * len(answer), len(answer), False) for answer in answers]

    questions = [ask("a", "abcd"), ask("b", "xy"), ask("c", "", facts=("36",))]
    settings = EvalSettings(metrics=["token_probability", "exact_facts"])
    report = evaluate(questions, scripted(["1", "2", "36"]), settings, scorer=Knowing())
    assert report.overall.perplexity == pytest.approx(math.exp(2))
    assert report.overall.scores["token_probability"].mean == pytest.approx(math.exp(-2))
    assert report.overall.scores["token_probability"].count == 2
    assert "perplexity 7.389" in "\n".join(report.lines())
    with pytest.raises(RecipeError, match="token_probability needs the model itself"):
        evaluate(questions, scripted(["1", "2", "36"]), settings)
