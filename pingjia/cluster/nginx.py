"""A pool -> the text of nginx's configuration. Pure; writing and reloading is `nginx_file.py`'s."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import Field, field_validator

from pingjia.cluster.replica import Replica
from pingjia.errors import UserError
from pingjia.recipe import Section

TEMPLATE = Path(__file__).with_name("nginx.conf.j2")


class NginxSettings(Section):
    """What stands around the pool.

    scope: `http` is a file that nginx.conf includes inside `http {}`; `main` is a whole nginx.conf.
    """

    scope: Literal["http", "main"] = "http"
    listen: str = ""
    """address:port or port of a server block; empty: the upstream alone."""
    server_name: str = "_"
    longest_answer_s: int = Field(600, ge=1, le=86_400)
    """The replicas' serve.deadline_s: nginx waits longer."""
    keepalive: int = Field(64, ge=1, le=10_000)
    """Idle connections to replicas that each worker of nginx keeps."""
    max_body_mb: int = Field(100, ge=1, le=10_000)
    worker_processes: int | Literal["auto"] = "auto"
    run_dir: str = "/run"
    """Where pid and temporary files lie (scope main)."""
    scheme: Literal["http", "https"] = "http"
    show_replica: bool = False
    """Tell clients in X-Replica who answered (address:port); several when one could not be reached."""

    @field_validator("listen", "server_name", "run_dir")
    @classmethod
    def _is_one_word(cls, value: str) -> str:
        if any(sign in value for sign in ";{}\"'\\\n #$"):
            raise ValueError(f"{value!r}: a sign that nginx would read as its own")
        return value


def render(service: str, members: Sequence[Replica], settings: NginxSettings, template: str | None = None) -> str:
    """The text of the file. `template`: a Jinja2 template instead of ours.

    Raises UserError for a template that is broken, with its line, and for members nginx could not take.
    """
    for member in members:
        _check(member)
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    try:
        source = environment.from_string(TEMPLATE.read_text(encoding="utf-8") if template is None else template)
        text = source.render(service=service, members=list(members), settings=settings)
    except UndefinedError as e:
        raise UserError(f"the template for nginx is broken: {e.message}; it has service, members, settings") from None
    except TemplateError as e:  # a syntax error knows its line
        line = f", line {e.lineno}" if isinstance(e, TemplateSyntaxError) else ""
        raise UserError(f"the template for nginx is broken: {e.message}{line}") from None
    return text if text.endswith("\n") else text + "\n"


_SERVER = re.compile(r"^\s*server (\S+):(\d+) weight=(\d+) [^;#]*; # (\S+)$", re.MULTILINE)


def read_members(text: str) -> list[Replica]:
    """Who is in a file that `render` wrote with our template: what was in force before a restart."""
    return [
        Replica(name, address.strip("[]"), int(port), int(weight))
        for address, port, weight, name in _SERVER.findall(text)
    ]


def _check(member: Replica) -> None:
    """Addresses come from a registry that others may write to: nothing of theirs may become a directive."""
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:%")
    if not member.address or set(member.address) - allowed or not 1 <= member.port <= 65_535:
        raise UserError(f"replica {member.name!r} has the address {member.authority!r}, which nginx cannot take")
    if member.weight < 1:
        raise UserError(f"replica {member.name!r} has weight {member.weight}; nginx takes 1 and more. Drain it instead")
    if set(member.name) - allowed:
        raise UserError(f"replica {member.name!r} has a name with signs that nginx would read as its own")
