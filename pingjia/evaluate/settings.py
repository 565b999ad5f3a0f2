"""The recipe section `eval:`. Light: naming the metrics here lets a recipe be checked without loading any of them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from pingjia.recipe import Section, near_miss

METRICS = (
    "rouge_1", "rouge_2", "rouge_l", "bleu_4", "exact_facts", "fact_share", "language_match", "refusal_match",
    "json_valid", "json_equal", "bert_score", "token_probability",
)  # fmt: skip


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list)]


class EvalSettings(Section):
    """What is asked, how long an answer may be, and how answers are scored.

    questions: files of questions, `samples:` names allowed; whoever reads files resolves them. One string is accepted.
    max_questions: at most so many, spread evenly over the files; None asks all.
    encoder, encoder_layer: what `bert_score` compares with: a packaged name or a directory, and whose layer's vectors
    (None: the last).
    """

    questions: Names = Field(default=[])
    max_tokens: int = Field(default=96, ge=1)
    max_questions: int | None = Field(default=None, ge=1)
    metrics: Names = Field(default=["rouge_l", "bleu_4", "exact_facts"], min_length=1)
    encoder: str = "minilm"
    encoder_layer: int | None = Field(default=None, ge=1)

    @field_validator("metrics")
    @classmethod
    def _known_once(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}{near_miss(name, METRICS)}; known: {', '.join(METRICS)}")
        if len(set(names)) < len(names):
            raise ValueError("a metric is named twice; keep one")
        return names
