"""The recipe keys of the data room (flat, at the top level of a recipe)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pingjia.recipe import Section


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list)]
"""A list of strings; one string alone is a list of one."""


class DataSettings(Section):
    """Which rows are used. Files are relative to the current directory; `samples:NAME` is a packaged sample."""

    dataset: Annotated[Names, Field(min_length=1)]
    eval_dataset: Names = Field(default=[])
    cutoff_len: int = Field(default=1024, ge=8)
    """Longest example, in tokens. A longer row is left out and named, never cut: its end would not be learnt."""
    domains: Names | None = None
    max_samples: int | None = Field(default=None, ge=1)
