"""`pingjia gateway MODEL`: the HTTP API without an engine; workers answer, through a queue."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from pingjia.cli.budgets import spent_by_key, split_prices
from pingjia.cli.console import errors
from pingjia.cli.serve import settings_of
from pingjia.cli.worker import REDIS_HELP, needed_url

TOKENIZER_HELP = "What the workers serve; only its tokenizer and chat template are loaded."


def gateway(
    model: Annotated[str, typer.Argument(help=TOKENIZER_HELP)],
    redis_url: Annotated[str, typer.Option(help=REDIS_HELP, envvar="PINGJIA_REDIS_URL")] = "",
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback API keys are required.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="What the base model is called outside.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="Append what was spent to this file.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="serve.KEY=VALUE or cost.KEY=VALUE.")] = None,
) -> None:
    """Take requests and put them into the queue, until SIGTERM or Ctrl-C. `pingjia worker` answers them."""
    from pingjia import gateway as room
    from pingjia.chat import load_tokenizer
    from pingjia.ledger import Ledger
    from pingjia.locate import locate_model
    from pingjia.queue.opening import check_redis

    given: dict[str, object] = {"host": host, "port": port, "served_model_name": served_model_name}
    others, prices = split_prices(overrides or [])
    settings = settings_of(others, {**given, "redis_url": redis_url or None}).serve
    room.preflight(settings)
    spent = spent_by_key(settings, prices, ledger)
    check_redis(needed_url(settings.redis_url))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    app = room.create_app(
        None, load_tokenizer(locate_model(model)), settings, ledger=Ledger(ledger) if ledger else None, spent=spent
    )
    room.serve(app, settings, on_ready=lambda url: errors.print(f"serving at {url}/v1", markup=False))
