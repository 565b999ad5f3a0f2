"""`pingjia gateway`: the HTTP API without an engine; workers answer through a queue, or other servers do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pingjia.cli.budgets import spent_by_key, split_prices
from pingjia.cli.console import errors
from pingjia.cli.environment import wants_debug
from pingjia.cli.serve import settings_of
from pingjia.cli.worker import REDIS_HELP, needed_url
from pingjia.errors import UserError
from pingjia.logs import set_up_logs

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pingjia.cost.settings import CostSettings
    from pingjia.gateway.settings import GatewaySettings

TOKENIZER_HELP = "What the workers serve; only its tokenizer and chat template are loaded. Not with --upstream."
UPSTREAM_HELP = "An OpenAI-compatible server that answers, usually ending in /v1; may be given several times."


def gateway(
    model: Annotated[str | None, typer.Argument(help=TOKENIZER_HELP)] = None,
    upstream: Annotated[list[str] | None, typer.Option(help=UPSTREAM_HELP, envvar="PINGJIA_UPSTREAM")] = None,
    redis_url: Annotated[str, typer.Option(help=REDIS_HELP, envvar="PINGJIA_REDIS_URL")] = "",
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback API keys are required.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="What the base model is called outside.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="Append what was spent to this file.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="serve.KEY=VALUE or cost.KEY=VALUE.")] = None,
) -> None:
    """Take requests for workers behind a queue, or for other servers, until SIGTERM or Ctrl-C.

    `pingjia gateway MODEL --redis-url URL`: `pingjia worker` answers. `pingjia gateway --upstream URL`: vLLM, SGLang,
    llama.cpp, another pingjia or any other server of OpenAI's API does.
    """
    from pingjia import gateway as room

    given: dict[str, object] = {"host": host, "port": port, "served_model_name": served_model_name}
    if upstream:
        given["upstream"] = upstream
    others, prices = split_prices(overrides or [])
    settings = settings_of(others, {**given, "redis_url": redis_url or None}).serve
    room.preflight(settings)
    set_up_logs(debug=wants_debug())
    app = _before_servers if settings.upstream.servers else _before_workers
    room.serve(
        app(model, settings, prices, ledger),
        settings,
        on_ready=lambda url: errors.print(f"serving at {url}/v1", markup=False),
    )


def _before_workers(model: str | None, settings: GatewaySettings, prices: CostSettings, ledger: Path | None) -> FastAPI:
    from pingjia.chat import load_tokenizer
    from pingjia.gateway import create_app
    from pingjia.ledger import Ledger
    from pingjia.locate import locate_model
    from pingjia.queue.opening import check_redis

    if model is None:
        raise UserError("nobody answers: give the model that workers serve, or --upstream URL of a server")
    spent = spent_by_key(settings, prices, ledger)
    check_redis(needed_url(settings.redis_url))
    tokenizer = load_tokenizer(locate_model(model))
    return create_app(None, tokenizer, settings, ledger=Ledger(ledger) if ledger else None, spent=spent)


def _before_servers(model: str | None, settings: GatewaySettings, prices: CostSettings, ledger: Path | None) -> FastAPI:
    from pingjia.gateway import create_app
    from pingjia.gateway.upstream import Upstream
    from pingjia.ledger import Ledger
    from pingjia.queue.opening import check_redis

    if model is not None:
        raise UserError(f"{model!r} and --upstream contradict each other: the servers' own models are served")
    backend = Upstream(settings.upstream)
    spent = spent_by_key(settings, prices, ledger)
    if settings.redis_url is not None:
        check_redis(settings.redis_url)
    seats = min(backend.seats, settings.max_concurrent)
    return create_app(backend, None, settings, seats=seats, ledger=Ledger(ledger) if ledger else None, spent=spent)
