"""`pingjia serve MODEL`: the OpenAI-compatible HTTP API over one engine in this process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pingjia import recipe as recipes
from pingjia.cli.budgets import spent_by_key, split_prices
from pingjia.cli.console import errors
from pingjia.cli.environment import wants_debug
from pingjia.cli.membership import (
    ADVERTISE_HELP,
    CONSUL_HELP,
    NAME_HELP,
    SERVICE_HELP,
    WEIGHT_HELP,
    Flags,
    joining_of,
    member_of,
)
from pingjia.cost.settings import CostSettings
from pingjia.engine.settings import EngineSettings
from pingjia.errors import UserError
from pingjia.gateway.settings import GatewaySettings
from pingjia.logs import set_up_logs
from pingjia.worker.settings import WorkerSettings

MODEL_HELP = "Model directory, .gguf file or packaged name (smollm2)."
ADAPTER_HELP = "Adapter directory, or NAME=DIR; may be given several times."
DTYPE_HELP = "auto, float32, bfloat16 or float16."
DEVICE_HELP = "auto, cpu, cuda, ..."
BITS_HELP = "Pack the base to 4 or 8 bits while loading."


def serve(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    adapter: Annotated[list[str] | None, typer.Option("--adapter", help=ADAPTER_HELP)] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback API keys are required.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="What the base model is called outside.")] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="Share the queue: redis://host:port/number.", envvar="PINGJIA_REDIS_URL")
    ] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    bits: Annotated[int | None, typer.Option(help=BITS_HELP)] = None,
    ledger: Annotated[Path | None, typer.Option(help="Append what was spent to this file.")] = None,
    consul: Annotated[str | None, typer.Option(help=CONSUL_HELP)] = None,
    service: Annotated[str, typer.Option(help=SERVICE_HELP)] = "pingjia",
    name: Annotated[str | None, typer.Option(help=NAME_HELP)] = None,
    advertise: Annotated[str | None, typer.Option(help=ADVERTISE_HELP)] = None,
    weight: Annotated[int | None, typer.Option(help=WEIGHT_HELP, min=1, max=65_535)] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="SECTION.KEY=VALUE of serve, engine, worker or cost, as in a recipe."),
    ] = None,
) -> None:
    """Serve a model, with its adapters, until SIGTERM or Ctrl-C. Answers in work are finished first.

    A request that names no model gets the adapter when there is just one.
    """
    adapters = parse_adapters(adapter or [])
    given: dict[str, object] = {"host": host, "port": port, "served_model_name": served_model_name}
    given["redis_url"] = redis_url
    if len(adapters) == 1:
        given["default_model"] = next(iter(adapters))
    others, prices = split_prices(overrides or [])
    sections = settings_of(others, given)
    flags = Flags(consul, service, name, advertise, weight) if consul else None
    run_server(
        model,
        adapters=adapters,
        gateway_settings=sections.serve,
        engine_settings=sections.engine,
        worker_settings=sections.worker,
        cost_settings=prices,
        dtype=dtype,
        device=device,
        bits=bits,
        ledger_file=ledger,
        pool=flags,
    )


def run_server(
    model: str,
    *,
    adapters: dict[str, Path],
    gateway_settings: GatewaySettings,
    engine_settings: EngineSettings,
    worker_settings: WorkerSettings | None = None,
    cost_settings: CostSettings | None = None,
    dtype: str = "auto",
    device: str = "auto",
    bits: int | None = None,
    ledger_file: Path | None = None,
    pool: Flags | None = None,
) -> None:
    """Load, serve, drain. Everything that can be refused without the model is refused before it is loaded."""
    from pingjia import Engine, gateway
    from pingjia.ledger import Fact, Ledger
    from pingjia.meter import Meter
    from pingjia.queue.opening import check_redis
    from pingjia.worker import Worker

    gateway.preflight(gateway_settings)
    spent = spent_by_key(gateway_settings, cost_settings or CostSettings(), ledger_file)
    if gateway_settings.redis_url is not None:
        check_redis(gateway_settings.redis_url)
    joining = joining_of(pool, gateway_settings.host, gateway_settings.port) if pool is not None else None
    set_up_logs(debug=wants_debug())
    ledger = Ledger(ledger_file) if ledger_file else None
    with Meter() as meter:
        started = time.perf_counter()
        errors.print(f"loading {model} ...", markup=False)
        engine = Engine(model, dtype=dtype, device=device, bits=bits, settings=engine_settings)
        for name, path in adapters.items():
            engine.load_adapter(name, path)
        errors.print(
            f"loaded in {time.perf_counter() - started:.1f} s: {', '.join(c.id for c in engine.models())}", markup=False
        )
        worker = Worker(engine, worker_settings)
        worker.start()
        try:
            app = gateway.create_app(
                worker,
                engine.tokenizer,
                gateway_settings,
                seats=engine_settings.max_num_seqs,
                ledger=ledger,
                spent=spent,
                adapters=worker,
            )
            member = member_of(joining, worker, engine, engine_settings.max_num_seqs) if joining is not None else None

            def on_ready(url: str) -> None:
                errors.print(f"serving at {url}/v1", markup=False)
                if member is not None:
                    member.start(url)

            gateway.serve(app, gateway_settings, on_ready=on_ready, on_stop=member.stop if member else None)
        finally:
            worker.stop(gateway_settings.drain_s)
    if ledger is not None:
        ledger.append(
            Fact(kind="serve", seconds=round(meter.seconds, 3), peak_bytes=meter.peak_bytes, note={"model": model})
        )


def parse_adapters(values: list[str]) -> dict[str, Path]:
    """NAME=DIR or DIR (whose last part is the name) -> {name: directory}. UserError for a name given twice."""
    adapters: dict[str, Path] = {}
    for value in values:
        name, sep, directory = value.partition("=")
        path = Path(directory if sep else value)
        name = name if sep else path.resolve().name
        if name in adapters:
            raise UserError(f"two adapters are called {name!r}; name them: --adapter NAME=DIR")
        adapters[name] = path
    return adapters


class Sections(recipes.Section):
    """What can be set about a server and its worker."""

    serve: GatewaySettings = GatewaySettings()
    engine: EngineSettings = EngineSettings()
    worker: WorkerSettings = WorkerSettings()


def settings_of(overrides: list[str], given: dict[str, object]) -> Sections:
    """The sections from flags (of serve) and --set; --set wins."""
    raw: dict[str, dict[str, object]] = {"serve": given}
    for override in overrides:
        recipes.assign(raw, *recipes.split_override(override))
    return recipes.build(raw, Sections, flat=(), name="--set")
