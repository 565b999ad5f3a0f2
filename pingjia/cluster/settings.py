"""How Consul is reached and what a pool is called. Only values; the names of the environment are Consul's own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, field_validator

from pingjia.errors import UserError
from pingjia.recipe import Section

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")


class ConsulSettings(Section):
    """Address, access and TLS of a Consul agent. A token is read from the environment or a file, never an argument."""

    url: str = "http://127.0.0.1:8500"
    token: str = Field("", repr=False)
    ca_file: str | None = None
    """Certificates that Consul's must be signed by; those of the system when None."""
    cert_file: str | None = None
    """Our own certificate, with `key_file`, where Consul asks for one."""
    key_file: str | None = None
    verify: bool = True
    timeout_s: float = Field(3.0, gt=0.0)
    """For one answer; blocking queries get the time they wait on top."""


class MemberSettings(Section):
    """What one replica says of itself and how often. Times in seconds."""

    service: str = "pingjia"
    """The pool. Replicas of one pool serve the same base model."""
    name: str
    """This replica; no other of the pool has it."""
    address: str
    """Where others reach it. Not 0.0.0.0."""
    port: int = Field(ge=1, le=65535)
    scheme: str = "http"
    ttl_s: float = Field(3.0, ge=0.5, le=60.0)
    """Consul counts a replica that is not heard of for this long as failed."""
    beat_s: float = Field(0.75, gt=0.0, le=20.0)
    leave_s: float = Field(3.0, ge=0.0, le=600.0)
    """Between leaving Consul and taking no more requests: what balancers need to notice."""
    forget_after_s: float = Field(3600.0, ge=60.0)
    """Consul forgets a replica that has failed for this long."""

    @property
    def id(self) -> str:
        """In an agent, where services of all pools lie side by side."""
        return f"{self.service}:{self.name}"

    @field_validator("service", "name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(f"{value!r}: 1 to 63 letters, digits, '-', '_' and '.', neither end a sign")
        return value


def from_environment(url: str | None = None, environ: Mapping[str, str] | None = None) -> ConsulSettings:
    """Settings from the variables that Consul's own command reads; `url` wins over CONSUL_HTTP_ADDR.

    Raises UserError for a token file that cannot be read.
    """
    env = os.environ if environ is None else environ
    address = url or env.get("CONSUL_HTTP_ADDR") or ConsulSettings().url
    if "://" not in address:
        address = f"{'https' if _is_yes(env.get('CONSUL_HTTP_SSL')) else 'http'}://{address}"
    return ConsulSettings(
        url=address.rstrip("/"),
        token=env.get("CONSUL_HTTP_TOKEN") or _token_of(env.get("CONSUL_HTTP_TOKEN_FILE")),
        ca_file=env.get("CONSUL_CACERT") or None,
        cert_file=env.get("CONSUL_CLIENT_CERT") or None,
        key_file=env.get("CONSUL_CLIENT_KEY") or None,
        verify=env.get("CONSUL_HTTP_SSL_VERIFY", "1").lower() not in ("0", "false", "f"),
    )


def _is_yes(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "t")


def _token_of(file: str | None) -> str:
    if not file:
        return ""
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except OSError as e:
        raise UserError(f"CONSUL_HTTP_TOKEN_FILE {file}: {e.strerror}; it holds the ACL token") from None
