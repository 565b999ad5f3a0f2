"""The recipe section `serve:`. Only values and their ranges; who obeys them is said beside each."""

from __future__ import annotations

import ipaddress
import re

from pydantic import Field, field_validator

from pingjia.gateway.upstream_settings import UpstreamSettings
from pingjia.recipe import Section


class SemanticSettings(Section):
    """Kept answers for questions that say the same in other words. Off without a directory."""

    directory: str | None = None
    """An encoder: a directory, or minilm. It runs in a process of its own."""
    threshold: float = Field(0.9, ge=0.0, le=1.0)
    """Cosine of two questions from which they may mean the same; what tells must be equal besides."""
    shadow_share: float = Field(0.05, ge=0.0, le=1.0)
    """Of such answers, those that are computed all the same and compared."""
    wrong_budget: float = Field(0.02, ge=0.0, le=1.0)
    """Of the compared, those that may be wrong; beyond it this is turned off."""
    max_entries: int = Field(10_000, ge=1)
    """Questions remembered; those asked least recently go."""


class CacheSettings(Section):
    """Answers that are kept, where an equal question must get an equal answer: at temperature 0 or with a seed."""

    enabled: bool = True
    max_mb: float = Field(64.0, gt=0.0, le=1e6, allow_inf_nan=False)
    """Answers kept; beyond it the ones least recently used go."""
    max_age_s: float = Field(3600.0, gt=0.0, le=3.2e7, allow_inf_nan=False)
    semantic: SemanticSettings = SemanticSettings()


class LanguageRule(Section):
    """What happens to a conversation in one language. Nothing but detecting it when all are None."""

    model: str | None = None
    """Answers requests that name no model, or the default or base model."""
    system: str | None = Field(None, min_length=1)
    """System prompt of conversations without one."""
    refuse: str | None = Field(None, min_length=1)
    """The answer, word for word; the model is not asked."""


class LanguageSettings(Section):
    """Language of chat requests. A rule's key is an ISO 639-1 code (zh, en, ja), mixed, und (no letters) or other."""

    detect: bool = False
    """Tell the language (header X-Language, a metric) also without rules."""
    rules: dict[str, LanguageRule] = Field({}, max_length=100)

    @field_validator("rules")
    @classmethod
    def _keys_are_languages(cls, rules: dict[str, LanguageRule]) -> dict[str, LanguageRule]:
        for name in rules:
            if not re.fullmatch("[a-z]{2}|mixed|und|other", name):
                raise ValueError(f"{name!r} is no language; write a code of two letters, mixed, und or other")
        return rules

    @property
    def is_on(self) -> bool:
        return self.detect or bool(self.rules)


class GatewaySettings(Section):
    """How the HTTP API listens, whom it lets in and how much it takes. Times in seconds."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_keys: tuple[str, ...] = ()
    """sha256 of each key in hex, never the key itself (`gateway.hash_key`)."""
    api_keys_env: str = "PINGJIA_API_KEYS"
    """Environment variable with further keys in the clear, separated by commas or spaces."""
    keys_file: str | None = None
    """File of keys with limits (`pingjia keys`); read again whenever it changes."""
    served_model_name: str | None = None
    """What the base model is called outside; its own name when None."""
    default_model: str | None = None
    """The model of a request that names none; needed only when more than one is served."""
    default_max_tokens: int = Field(512, ge=1)
    default_temperature: float = Field(0.0, ge=0.0, le=2.0)
    """For requests that give no temperature. 0 is greedy: the same question gets the same answer."""
    max_concurrent: int = Field(64, ge=1)
    """Answers in work at once, waiting in the engine's queue included; beyond it 503."""
    max_body_bytes: int = Field(2_000_000, ge=1_000)
    deadline_s: float = Field(600.0, gt=0.0)
    """The longest a request may take from its arrival; then 504."""
    drain_s: float = Field(30.0, ge=0.0)
    """What answers in work get to finish after SIGTERM."""
    ping_s: float = Field(10.0, gt=0.0)
    """A stream that has nothing to say for this long sends a comment, so that proxies keep it open."""
    max_connections: int = Field(2048, ge=1)
    """Open connections; whoever comes then gets 503 at once."""
    head_s: float = Field(10.0, gt=0.0)
    """A client must send its request head within this."""
    body_s: float = Field(30.0, gt=0.0)
    """And its body within this."""
    redis_url: str | None = None
    """`redis://host:port/db`: what gateways and workers share lies there and outlives them. None: in this process."""
    queue_above_rps: float = Field(50.0, ge=0.0)
    """Measured requests per second above which requests go through the queue; 0: all of them."""
    queue_max_requests: int = Field(1_000, ge=1)
    """Requests that may wait in the queue; beyond it 503."""
    queue_max_tokens: int = Field(2_000_000, ge=1)
    """And their tokens, prompts and the longest possible answers together."""
    queue_lease_s: float = Field(10.0, gt=0.0)
    """A worker that is not heard of for this long is dead, and another takes over what it had claimed."""
    queue_max_deliveries: int = Field(3, ge=1)
    """Workers that may die over one request before it fails."""
    result_s: float = Field(86_400.0, gt=0.0)
    """How long the result of an asynchronous request is kept."""
    files_dir: str | None = None
    """Where files of batches lie; ~/.local/state/pingjia/PORT when None."""
    max_file_bytes: int = Field(100_000_000, ge=1_000)
    """The largest file a client may upload for a batch."""
    traces_url: str | None = Field(None, pattern="^https?://")
    """`http://collector:4318`: traces of requests go there, by OTLP over HTTP. OTEL_* variables ask for them too."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call; none by default."""
    access_log: bool = True
    local_limit_share: float = Field(0.5, gt=0.0, le=1.0)
    """Of each key's limits per minute, what this process allows alone while Redis cannot be reached."""
    cache: CacheSettings = CacheSettings()
    language: LanguageSettings = LanguageSettings()
    upstream: UpstreamSettings = UpstreamSettings()
    """Servers that answer in the place of an engine: a URL, a list of them, or a section."""

    @property
    def is_loopback(self) -> bool:
        """True when only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
