"""The recipe keys of the data room: which rows (flat, at the top level), and what is done to them (`prepare:`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pingjia.recipe import Section


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list)]
"""A list of strings; one string alone is a list of one."""

RuleName = Literal["repeated", "refusal", "markup", "echo", "language"]
PersonalKind = Literal["phone", "id_card", "bank_card", "email", "order_number"]
Share = Annotated[float, Field(ge=0, le=1)]


class DataSettings(Section):
    """Which rows are used. Files are relative to the current directory; `samples:NAME` is a packaged sample."""

    dataset: Annotated[Names, Field(min_length=1)]
    eval_dataset: Names = Field(default=[])
    cutoff_len: int = Field(default=1024, ge=8)
    """Longest example, in tokens. A longer row is left out and named, never cut: its end would not be learnt."""
    domains: Names | None = None
    max_samples: int | None = Field(default=None, ge=1)


class RuleSettings(Section):
    """Cheap rules on the words of a row."""

    skip: list[RuleName] = Field(default=[])  # rules that are not applied


class PersonalSettings(Section):
    """What happens to phone numbers, identity and bank cards, addresses of mail and order numbers in a row."""

    action: Literal["off", "report", "mask", "drop"] = "report"
    kinds: list[PersonalKind] = Field(default=["phone", "id_card", "bank_card", "email", "order_number"])


class DuplicateSettings(Section):
    """Which rows count as said already. `near`: estimated Jaccard similarity of character shingles; null: off."""

    exact: bool = True
    near: float | None = Field(0.85, ge=0.7, le=1)  # below 0.7 the search would miss more than 7 % of the pairs
    leakage: bool = True  # training rows that equal, or nearly equal, a row of eval_dataset are rejected


class QualitySettings(Section):
    """BERTScore F1 thresholds; null: that comparison is off."""

    encoder: str = "minilm"  # the packaged small encoder, or a model directory
    layer: int | None = None  # hidden layer to compare; null: the last
    reference: Share | None = None  # a row's answer against its own `reference`
    augmented: Share | None = 0.7  # a made row against the row it was made from; measured: benchmarks/bert_score.py
    relevance: Share | None = None  # answer against question; says they are about the same thing, not that it is good
    batch_size: int = Field(32, ge=1)


class LanguageSettings(Section):
    """Chinese share = Chinese characters / letters of all questions and answers."""

    min_zh_share: Share | None = None  # the plan's figure is 0.7; null: only reported
    action: Literal["refuse", "drop"] = "refuse"  # drop: leave out the least Chinese rows until the share is reached
    keep: Names | None = None  # languages to keep (zh, en, mixed, ...); null: all


class DomainSettings(Section):
    """Where a row's domain comes from when it has none, and what shares the domains shall have."""

    rules: str | None = None  # YAML file: domain -> words or /regular expressions/
    clusters: int | None = Field(None, ge=2, le=100)  # group rows without a domain by meaning into so many
    target: Literal["balanced"] | dict[str, Share] | None = None
    method: Literal["down", "up", "weights"] = "down"
    max_repeat: int = Field(3, ge=1, le=100)  # up: how often one row may stand at most


class SynonymSettings(Section):
    """New rows by putting synonyms into questions."""

    ratio: float = Field(0.0, ge=0, le=10)  # made rows per row
    replace: Share = 0.2  # of the words that may be replaced; at least one
    thesaurus: str | None = None  # a file of your own words, used besides the packaged ones


class BackTranslationSettings(Section):
    """New rows by translating questions to another language and back: by two model directories, or by an endpoint."""

    ratio: float = Field(0.0, ge=0, le=1)  # a translator gives one wording of a question, so at most 1
    source: str = "zh"  # only questions in this language
    via: str = "en"
    forward: str | None = None  # MarianMT (or other seq2seq) model directory source -> via
    backward: str | None = None
    codes: tuple[str, str] | None = None  # what a multilingual model calls source and via: [zho_Hans, eng_Latn]
    endpoint: str | None = None  # base URL of an OpenAI-compatible server
    model: str | None = None  # its model name
    api_key_env: str = "OPENAI_API_KEY"  # name of the environment variable that holds the key


class AugmentSettings(Section):
    """Rows that are made from rows. Numbers, negations, names, codes and placeholders never change."""

    synonyms: SynonymSettings = Field(default_factory=SynonymSettings)
    back_translation: BackTranslationSettings = Field(default_factory=BackTranslationSettings)
    domains: Names | None = None  # only rows of these domains; null: all


class PrepareSettings(Section):
    """What `pingjia data prepare` does to the rows of a recipe, in this order."""

    length_policy: Literal["drop", "truncate-prompt", "split-turns"] = "drop"
    personal: PersonalSettings = Field(default_factory=PersonalSettings)
    rules: RuleSettings = Field(default_factory=RuleSettings)
    languages: LanguageSettings = Field(default_factory=LanguageSettings)
    duplicates: DuplicateSettings = Field(default_factory=DuplicateSettings)
    quality: QualitySettings = Field(default_factory=QualitySettings)
    augment: AugmentSettings = Field(default_factory=AugmentSettings)
    domains: DomainSettings = Field(default_factory=DomainSettings)
    seed: int = Field(42, ge=0)
    engine: Literal["local", "ray"] = "local"
    processes: int = Field(1, ge=1, le=256)
