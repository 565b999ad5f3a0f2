"""Ask every question once, score every answer. Knows no model: anything that satisfies Generator is asked."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence

from pingjia.errors import DataError, RecipeError
from pingjia.evaluate.facts import is_blank
from pingjia.evaluate.metrics import BERT_SCORE, TOKEN_PROBABILITY, Pair, score_all
from pingjia.evaluate.report import EvalReport, Row
from pingjia.evaluate.settings import EvalSettings
from pingjia.similarity import TextEncoder
from pingjia.types import Completion, Example, Generator, Likelihood, Sampling, Scorer

OnDone = Callable[[int, Completion], None]

_HAN = re.compile(r"[\u3400-\u9fff]")
_WORD = re.compile(r"[A-Za-z]+")


def evaluate(
    questions: Sequence[Example],
    generator: Generator,
    settings: EvalSettings,
    *,
    on_done: OnDone | None = None,
    encoder: TextEncoder | None = None,
    scorer: Scorer | None = None,
) -> EvalReport:
    """Answer the questions greedily and score the answers against what they expect.

    `on_done(index, completion)` is called as each answer ends; `index` counts the questions that are asked, which are
    `select(questions, settings.max_questions)`. An answer cut at max_tokens is scored as it is and counted as cut.
    `encoder` is needed for the metric `bert_score` (pingjia.models.load_encoder), `scorer` for `token_probability` (an
    engine is one), and neither is used for anything else. Raises DataError, before anything is generated, for no
    questions or one that cannot be asked or scored; RecipeError for a metric without what it needs.
    """
    asked = select(questions, settings.max_questions)
    for question in asked:
        _check(question)
    if BERT_SCORE in settings.metrics and encoder is None:
        raise RecipeError("eval.metrics: bert_score needs an encoder, and none was given; give one, or leave it out")
    if TOKEN_PROBABILITY in settings.metrics and scorer is None:
        raise RecipeError(
            "eval.metrics: token_probability needs the model itself, which a server does not give; leave it out, or "
            "evaluate the model's directory"
        )
    started = time.perf_counter()
    sampling = Sampling(max_tokens=settings.max_tokens, temperature=0.0)
    answers = generator.generate([question.prompt for question in asked], sampling, on_done=on_done)
    likelihoods = _likelihoods(asked, settings, scorer)
    seconds = time.perf_counter() - started
    pairs = [Pair(a.text, expected_answer(q), q.facts) for q, a in zip(asked, answers, strict=True)]
    scores = score_all(pairs, settings.metrics, encoder)
    rows = [_row(*one) for one in zip(asked, answers, pairs, scores, likelihoods, strict=True)]
    return EvalReport.of(
        rows, settings.metrics, max_tokens=settings.max_tokens, seconds=seconds, encoder=_encoder_name(settings)
    )


def select(questions: Sequence[Example], limit: int | None) -> list[Example]:
    """At most `limit` questions, spread evenly over the list: files are often sorted by topic."""
    if limit is None or limit >= len(questions):
        chosen = list(questions)
    else:
        chosen = [questions[i * len(questions) // limit] for i in range(limit)]
    if not chosen:
        raise DataError("no questions to evaluate; name at least one file with questions in eval.questions")
    return chosen


def expected_answer(question: Example) -> str:
    """What the answer is compared with: the question's `reference` when it has one, else its response."""
    return question.reference if question.reference is not None else question.response


def language(question: Example) -> str:
    """The question's own `lang`; without one "zh" or "en", whichever has more Chinese characters or Latin words."""
    if question.lang:
        return question.lang
    text = " ".join(message.text for message in question.messages)
    return "zh" if len(_HAN.findall(text)) >= len(_WORD.findall(text)) else "en"


def _check(question: Example) -> None:
    where = question.where or "a question"
    if not question.prompt:
        raise DataError(f"{where}: a question without a prompt: nothing comes before its answer")
    if question.images:
        raise DataError(f"{where}: has {len(question.images)} image(s), and evaluation asks in text only; leave it out")
    if question.tools:
        raise DataError(f"{where}: has {len(question.tools)} tool(s), and evaluation asks without any; leave it out")
    blank = [fact for fact in question.facts if is_blank(fact)]
    if blank:
        raise DataError(f"{where}: facts: {blank[0]!r} is blank and would be found in any answer; remove it")
    if not expected_answer(question).strip() and not question.facts:
        raise DataError(f"{where}: neither an expected answer nor facts: there is nothing to score against")


def _likelihoods(
    asked: Sequence[Example], settings: EvalSettings, scorer: Scorer | None
) -> Sequence[Likelihood | None]:
    """Of the expected answers; None for a question that has facts alone."""
    found: list[Likelihood | None] = [None] * len(asked)
    if TOKEN_PROBABILITY in settings.metrics:
        assert scorer is not None
        texts = [i for i, question in enumerate(asked) if expected_answer(question).strip()]
        expected = [expected_answer(asked[i]) for i in texts]
        for i, one in zip(texts, scorer.likelihoods([asked[i].prompt for i in texts], expected), strict=True):
            found[i] = one
    return found


def _encoder_name(settings: EvalSettings) -> str:
    if BERT_SCORE not in settings.metrics:
        return ""
    layer = settings.encoder_layer
    return settings.encoder if layer is None else f"{settings.encoder}, layer {layer}"


def _row(
    question: Example, answer: Completion, pair: Pair, scores: dict[str, float], likelihood: Likelihood | None
) -> Row:
    if likelihood is not None:
        scores = scores | {TOKEN_PROBABILITY: math.exp(likelihood.logprob / likelihood.num_tokens)}
    return Row(
        prompt=tuple(question.prompt),
        expected=pair.expected,
        answer=answer.text,
        scores=scores,
        finish_reason=answer.finish_reason,
        where=question.where,
        domain=question.domain,
        lang=language(question),
        facts=tuple(question.facts),
        missing_facts=pair.missing,
        usage=answer.usage,
        expected_logprob=likelihood.logprob if likelihood is not None else 0.0,
        expected_tokens=likelihood.num_tokens if likelihood is not None else 0,
    )
