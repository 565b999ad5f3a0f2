"""The whole recipe: every room's section in one model. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import Field

from pingjia import recipe
from pingjia.cost.settings import CostSettings
from pingjia.data.settings import DataSettings, PrepareSettings
from pingjia.engine.settings import EngineSettings
from pingjia.evaluate.settings import EvalSettings
from pingjia.gateway.settings import GatewaySettings
from pingjia.models.settings import ModelSettings
from pingjia.recipe import Section
from pingjia.tune.settings import TuneSettings
from pingjia.worker.settings import WorkerSettings

FLAT = ("model", "data", "tune")


class AskSettings(Section):
    """What `pingjia run` asks the served model at the end."""

    questions: list[str] = Field(default_factory=list)
    max_tokens: int = Field(96, ge=1)


class Recipe(Section):
    """One YAML file. Sections `model`, `data` and `tune` have their keys at the top level."""

    model: ModelSettings
    data: DataSettings
    tune: TuneSettings
    prepare: PrepareSettings | None = None
    eval: EvalSettings | None = None
    serve: GatewaySettings = Field(default_factory=GatewaySettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    cost: CostSettings = Field(default_factory=CostSettings)
    ask: AskSettings = Field(default_factory=AskSettings)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    return recipe.load(path, overrides, Recipe, flat=FLAT)


def save_recipe(settings: Recipe, file: Path) -> None:
    """Write a recipe so that `load_recipe` reads the same one."""
    sections = settings.model_dump(mode="json", exclude_unset=True)
    flat = {key: value for name in FLAT for key, value in sections.pop(name, {}).items()}
    file.write_text(yaml.safe_dump(flat | sections, allow_unicode=True), encoding="utf-8")


def ledger_path(settings: Recipe) -> Path:
    """Everything a recipe's runs spend is written beside what they produce."""
    return Path(settings.tune.output_dir) / "ledger.jsonl"
