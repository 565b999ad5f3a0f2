"""`pingjia worker MODEL`: one engine that answers what gateways put into a queue."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pingjia.cli.console import errors
from pingjia.cli.environment import wants_debug
from pingjia.cli.membership import (
    ADVERTISE_HELP,
    CONSUL_HELP,
    NAME_HELP,
    WEIGHT_HELP,
    Flags,
    Joining,
    joining_of,
    member_of,
)
from pingjia.cli.serve import (
    ADAPTER_HELP,
    BITS_HELP,
    DEVICE_HELP,
    DTYPE_HELP,
    MODEL_HELP,
    Sections,
    parse_adapters,
    settings_of,
)
from pingjia.engine.settings import EngineSettings
from pingjia.errors import UserError
from pingjia.logs import set_up_logs
from pingjia.trace import open_tracer

if TYPE_CHECKING:
    from pingjia import Engine
    from pingjia.worker.health import Health

REDIS_HELP = "The queue: redis://host:port/number."


def worker(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    redis_url: Annotated[str, typer.Option(help=REDIS_HELP, envvar="PINGJIA_REDIS_URL")] = "",
    adapter: Annotated[list[str] | None, typer.Option("--adapter", help=ADAPTER_HELP)] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    bits: Annotated[int | None, typer.Option(help=BITS_HELP)] = None,
    health_host: Annotated[str, typer.Option(help="Address of health and metrics; they need no key.")] = "127.0.0.1",
    health_port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 0,
    consul: Annotated[str | None, typer.Option(help=CONSUL_HELP)] = None,
    service: Annotated[str, typer.Option(help="The pool: who answers from one queue.")] = "pingjia-workers",
    name: Annotated[str | None, typer.Option(help=NAME_HELP)] = None,
    advertise: Annotated[str | None, typer.Option(help=ADVERTISE_HELP)] = None,
    weight: Annotated[int | None, typer.Option(help=WEIGHT_HELP, min=1, max=65_535)] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="SECTION.KEY=VALUE of serve, engine or worker, as in a recipe.")
    ] = None,
) -> None:
    """Answer requests from the queue until SIGTERM or Ctrl-C. Answers in work are finished first.

    Workers of one queue serve the same model and adapters, under the same names. /health/live, /health/ready and
    /metrics have a port of their own, from the start of loading on.
    """
    from pingjia.queue.opening import check_redis

    sections = settings_of(overrides or [], {"redis_url": redis_url or None})
    check_redis(needed_url(sections.serve.redis_url))
    adapters = parse_adapters(adapter or [])
    flags = Flags(consul, service, name, advertise, weight) if consul else None
    joining = joining_of(flags, health_host, health_port, "--health-port") if flags else None

    from pingjia.worker.health import Health, served  # takes a moment: after everything that can be refused without it

    set_up_logs(debug=wants_debug())
    with served(health := Health(), health_host, health_port) as url:
        errors.print(f"health at {url}/health/ready; loading {model} ...", markup=False)
        place = _Place(joining, url) if joining else None
        _work(sections, health, lambda settings: _load(model, adapters, dtype, device, bits, settings), place)


def _load(
    model: str, adapters: dict[str, Path], dtype: str, device: str, bits: int | None, settings: EngineSettings
) -> Engine:
    from pingjia import Engine

    engine = Engine(model, dtype=dtype, device=device, bits=bits, settings=settings)
    for name, path in adapters.items():
        engine.load_adapter(name, path)
    return engine


@dataclass(frozen=True, slots=True)
class _Place:
    """In a pool, at the URL of health."""

    joining: Joining
    url: str


def _work(
    sections: Sections, health: Health, load: Callable[[EngineSettings], Engine], place: _Place | None = None
) -> None:
    from pingjia.gateway.roads import limits_of
    from pingjia.queue.opening import open_queue
    from pingjia.worker import Worker
    from pingjia.worker.pulling import pull

    engine, limits = load(sections.engine), limits_of(sections.serve)
    backend = Worker(engine, sections.worker)
    tracer = open_tracer("pingjia-worker", sections.serve.traces_url, os.environ)
    backend.start()
    member = None
    try:
        if place is not None:
            member = member_of(place.joining, backend, engine, sections.engine.max_num_seqs, is_balanced=False)
            member.start(place.url)
        pull(
            backend,
            lambda: open_queue(sections.serve.redis_url, limits),
            seats=sections.engine.max_num_seqs,
            lease_s=limits.lease_s,
            drain_s=sections.serve.drain_s,
            is_alive=backend.is_alive,
            health=health,
            tracer=tracer,
            on_ready=lambda name: errors.print(f"working as {name}", markup=False),
        )
    finally:
        if member is not None:
            member.stop()
        backend.stop()
        tracer.close()


def needed_url(url: str | None) -> str:
    """The queue's URL. Raises UserError without one."""
    if url is None:
        raise UserError("no queue: give --redis-url redis://host:port/number, or set PINGJIA_REDIS_URL")
    return url
