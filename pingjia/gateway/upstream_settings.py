"""The recipe section `serve.upstream`: servers that answer in the place of an engine. Only values and their ranges."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from pingjia.recipe import Section


class ServerSettings(Section):
    """One OpenAI-compatible server. In a recipe its URL alone will do."""

    url: str = Field(min_length=1)
    """What its clients use, usually ending in /v1."""
    models: dict[str, str] = Field({}, max_length=1000)
    """Name here -> name there. Models that are not named are not served; all are when it is empty."""
    api_key_env: str | None = None
    """Environment variable with the key that is sent to it."""
    weight: float = Field(1.0, gt=0.0, le=1e6, allow_inf_nan=False)
    """Its speed beside that of the others."""
    max_concurrent: int = Field(64, ge=1)
    """Answers it works on at once; more wait here."""

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


class UpstreamSettings(Section):
    """Servers that answer in the place of an engine; none by default. Times in seconds."""

    servers: tuple[ServerSettings, ...] = ()
    retries: int = Field(2, ge=0, le=20)
    """Other servers that are asked when one fails before the first piece of its answer."""
    check_s: float = Field(1.0, gt=0.0)
    """How often an idle or silent server is asked whether it is well."""
    connect_s: float = Field(5.0, gt=0.0)
    first_token_s: float = Field(120.0, gt=0.0)
    """The longest that a server may be silent before its first token."""
    idle_s: float = Field(60.0, gt=0.0)
    """And between two tokens."""
    max_failures: int = Field(3, ge=1)
    """Broken answers in a row after which a server is left alone until it answers a check."""
    affinity: bool = False
    """Send a conversation to the server that has its beginning in its cache, as long as that one is not too busy."""
    revision: str = ""
    """Enters the names of kept answers: change it when a server's model was replaced under the same name."""

    @model_validator(mode="before")
    @classmethod
    def _may_be_urls(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"servers": [value]}
        return {"servers": value} if isinstance(value, list | tuple) else value
