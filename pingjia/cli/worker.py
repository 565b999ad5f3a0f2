"""`pingjia worker MODEL`: one engine that answers what gateways put into a queue."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from pingjia.cli.console import errors
from pingjia.cli.serve import ADAPTER_HELP, BITS_HELP, DEVICE_HELP, DTYPE_HELP, MODEL_HELP, parse_adapters, settings_of
from pingjia.errors import UserError

REDIS_HELP = "The queue: redis://host:port/number."


def worker(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    redis_url: Annotated[str, typer.Option(help=REDIS_HELP, envvar="PINGJIA_REDIS_URL")] = "",
    adapter: Annotated[list[str] | None, typer.Option("--adapter", help=ADAPTER_HELP)] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    bits: Annotated[int | None, typer.Option(help=BITS_HELP)] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="serve.KEY=VALUE or engine.KEY=VALUE, as in a recipe.")
    ] = None,
) -> None:
    """Answer requests from the queue until SIGTERM or Ctrl-C. Answers in work are finished first.

    Workers of one queue serve the same model and adapters, under the same names.
    """
    from pingjia.gateway.roads import limits_of
    from pingjia.queue.opening import check_redis, open_queue

    gateway_settings, engine_settings = settings_of(overrides or [], {"redis_url": redis_url or None})
    url = needed_url(gateway_settings.redis_url)
    check_redis(url)

    from pingjia import Engine  # takes seconds: after everything that can be refused without it
    from pingjia.worker import Worker
    from pingjia.worker.pulling import pull

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    errors.print(f"loading {model} ...", markup=False)
    engine = Engine(model, dtype=dtype, device=device, bits=bits, settings=engine_settings)
    for name, path in parse_adapters(adapter or []).items():
        engine.load_adapter(name, path)
    backend, limits = Worker(engine), limits_of(gateway_settings)
    backend.start()
    try:
        pull(
            backend,
            lambda: open_queue(url, limits),
            seats=engine_settings.max_num_seqs,
            lease_s=limits.lease_s,
            drain_s=gateway_settings.drain_s,
            is_alive=backend.is_alive,
            on_ready=lambda name: errors.print(f"working as {name}", markup=False),
        )
    finally:
        backend.stop()


def needed_url(url: str | None) -> str:
    """The queue's URL. Raises UserError without one."""
    if url is None:
        raise UserError("no queue: give --redis-url redis://host:port/number, or set PINGJIA_REDIS_URL")
    return url
