"""`pingjia cluster`: several replicas as one service: nginx in front, who is there, draining, rolling out, how many."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pingjia.cli.console import console, errors
from pingjia.cli.environment import wants_debug
from pingjia.cli.membership import SERVICE_HELP
from pingjia.errors import UserError
from pingjia.logs import set_up_logs

if TYPE_CHECKING:
    from pingjia.cluster.consul import Consul
    from pingjia.cluster.nginx import NginxSettings
    from pingjia.cluster.orders import WantedAdapter
    from pingjia.cluster.plan import Machine, Plan
    from pingjia.cluster.replica import Replica
    from pingjia.cluster.rollout import Pool
    from pingjia.cluster.watch import Watch

app = typer.Typer(help="Several replicas as one service.", no_args_is_help=True)

_Consul = Annotated[
    str | None,
    typer.Option("--consul", help="http://host:8500; CONSUL_HTTP_ADDR without. Token and TLS as Consul's own command."),
]
_Service = Annotated[str, typer.Option("--service", help=SERVICE_HELP)]
_Json = Annotated[bool, typer.Option("--json", help="For programs.")]
_Timeout = Annotated[float, typer.Option("--timeout", help="Seconds one replica may take.", min=1.0)]
_SET_HELP = "KEY=VALUE: server_name, keepalive, longest_answer_s, max_body_mb, worker_processes, run_dir, scheme."


@app.command("nginx")
def nginx(
    consul: _Consul = None,
    service: _Service = "pingjia",
    out: Annotated[Path | None, typer.Option(help="The file to keep; with --once, printed without.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Write once and end, for configuration management.")] = False,
    scope: Annotated[str, typer.Option(help="http: a file to include; main: a whole nginx.conf.")] = "http",
    listen: Annotated[
        str, typer.Option(help="Port or address:port of a server block; the upstream alone without.")
    ] = "",
    template: Annotated[Path | None, typer.Option(help="A Jinja2 template instead of ours.")] = None,
    test_command: Annotated[str | None, typer.Option(help="Instead of nginx -t; empty: none.")] = None,
    reload_command: Annotated[str | None, typer.Option(help="Instead of nginx -s reload; empty: none.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help=_SET_HELP)] = None,
) -> None:
    """Keep nginx's upstream what Consul says, until SIGTERM or Ctrl-C."""
    from pingjia.cluster.nginx_file import Commands, NginxFile, NginxRefused, NotReloaded
    from pingjia.cluster.watch import Watch

    settings = _nginx_settings(overrides or [], {"scope": scope, "listen": listen})
    text = _read(template) if template else None
    _try_template(service, settings, text)
    if out is None:
        if not once:
            raise UserError("--out FILE: which file shall be kept? (--once alone prints it)")
        _print_once(_consul(consul), service, settings, text)
        return
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such directory; nginx's include files lie in /etc/nginx/conf.d")
    if scope == "main" and not Path(settings.run_dir).is_dir():
        raise UserError(f"run_dir {settings.run_dir}: no such directory; nginx keeps its process id there, so make it")
    _refuse_taken_port(out, listen)
    of = Commands.of(scope, out)
    commands = Commands(
        of.test if test_command is None else Commands.parse(test_command, "").test,
        of.reload if reload_command is None else Commands.parse("", reload_command).reload,
    )
    watch = Watch(_consul(consul), service, NginxFile(out, commands), settings, template=text)
    try:
        selection = watch.once()
        if once:
            errors.print(f"{out}: {len(selection.members)} replicas of {service}", markup=False)
    except NginxRefused as e:
        raise UserError(f"{e}; {out} is as it was, what was refused lies beside it") from None
    except NotReloaded as e:
        errors.print(f"{e}; {out} is written, nginx reads it when it starts", markup=False)
    if once:
        return
    set_up_logs(debug=wants_debug())
    logging.getLogger("httpx").setLevel(logging.WARNING)
    _run_until_signal(watch)


@app.command("status")
def status(consul: _Consul = None, service: _Service = "pingjia", as_json: _Json = False) -> None:
    """Who is in the pool, how fast, and with what in work. Exit code 2 when nobody can answer."""
    from pingjia.cluster.replica import State
    from pingjia.cluster.rollout import num_in_work

    replicas = _pool(consul, service).replicas()
    with ThreadPoolExecutor(16) as threads:
        rows = [_row(r, n) for r, n in zip(replicas, threads.map(num_in_work, replicas), strict=True)]
    if as_json:
        console.print_json(json.dumps({"service": service, "replicas": rows}, ensure_ascii=False))
    else:
        _print_table(rows)
    if not any(r.state is State.PASSING for r in replicas):
        raise UserError(f"the pool {service!r} has {len(replicas)} replicas, and none can answer")


@app.command("drain")
def drain(
    name: Annotated[str, typer.Argument(help="The replica.")],
    consul: _Consul = None,
    service: _Service = "pingjia",
    undo: Annotated[bool, typer.Option("--undo", help="Put it back into the pool.")] = False,
    timeout: _Timeout = 300.0,
) -> None:
    """Take a replica out of the pool and wait until it has nothing in work. It goes on running; a restart ends it."""
    from pingjia.cluster.orders import Order
    from pingjia.cluster.rollout import StepFailed

    pool = _pool(consul, service, timeout)
    replica = pool.named(name)
    try:
        if undo:
            pool.order(replica, Order(replica.instance))
        else:
            pool.drain(replica, settle_s=3.0)
    except StepFailed as e:
        raise UserError(str(e)) from None
    console.print(f"{name}: {'in the pool again' if undo else 'drained, nothing in work'}", markup=False)


@app.command("rollout")
def rollout(
    consul: _Consul = None,
    service: _Service = "pingjia",
    restart: Annotated[
        str | None, typer.Option(help="Command that restarts one replica: 'ssh {host} systemctl restart pingjia'.")
    ] = None,
    back: Annotated[str | None, typer.Option(help="Command that puts the old one back; the same without.")] = None,
    expect_version: Annotated[str | None, typer.Option(help="What the restarted replica must report.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="NAME=DIR on the replicas' disks, or NAME= to stop serving it."),
    ] = None,
    digest: Annotated[
        str | None, typer.Option(help="What the adapter must have; read from DIR here if it exists, without.")
    ] = None,
    copy: Annotated[str | None, typer.Option(help="Command that brings files to one replica first.")] = None,
    allow_gap: Annotated[bool, typer.Option("--allow-gap", help="Also when nobody else would answer.")] = False,
    timeout: _Timeout = 300.0,
) -> None:
    """Change one replica after the other; stop at the first that fails, and put back what was changed."""
    from pingjia.cluster.rollout import Restart, SwapAdapters, refuse_gap, roll

    if (restart is None) == (not adapter):
        raise UserError("say what to roll out: --restart COMMAND, or --adapter NAME=DIR")
    pool = _pool(consul, service, timeout)
    replicas = pool.replicas()
    if not replicas:
        raise UserError(f"nobody is in the pool {service!r}")
    if not allow_gap:
        refuse_gap(replicas)
    if restart is not None:
        expect = {"version": expect_version} if expect_version else {}
        roll(replicas, Restart(pool, restart, back or "", expect), _say)
    else:
        roll(replicas, SwapAdapters(pool, _wanted(adapter or [], digest), copy or ""), _say)
    console.print(f"{len(replicas)} replicas changed", markup=False)


@app.command("plan")
def plan(
    users: Annotated[int, typer.Option(help="People who use it.", min=1)],
    requests_per_user: Annotated[float, typer.Option(help="Requests of each in the busiest hour.")],
    tokens_per_s: Annotated[
        float | None, typer.Option(help="Of one replica, all seats taken; the pool's own with --consul.")
    ] = None,
    seats: Annotated[int | None, typer.Option(help="Answers a replica computes at once (engine.max_num_seqs).")] = None,
    prefill_tokens_per_s: Annotated[float, typer.Option(help="Prompt tokens a second of one answer.")] = 200.0,
    prompt_tokens: Annotated[float, typer.Option(help="Of a request, on average.")] = 200.0,
    answer_tokens: Annotated[float, typer.Option(help="Of an answer, on average.")] = 150.0,
    cached_share: Annotated[float, typer.Option(help="Part of prompts found in the cache, 0 to 1.")] = 0.0,
    weights_gb: Annotated[float, typer.Option(help="Memory of the weights.")] = 0.0,
    kv_gb_per_seat: Annotated[float, typer.Option(help="Memory of one answer's keys and values.")] = 0.0,
    price_per_hour: Annotated[float, typer.Option(help="Yuan for one machine.")] = 0.0,
    max_wait: Annotated[float, typer.Option(help="Seconds that 95 of 100 requests may wait.")] = 2.0,
    max_busy: Annotated[float, typer.Option(help="Part of seats that may be taken, 0 to 1.")] = 0.85,
    spare: Annotated[int, typer.Option(help="Replicas beyond the load: for one that fails or restarts.", min=0)] = 1,
    balance: Annotated[str, typer.Option(help="turns: nginx; least: a gateway that knows the loads.")] = "turns",
    consul: _Consul = None,
    service: _Service = "pingjia",
    simulate: Annotated[bool, typer.Option("--simulate", help="Hold the answer against a simulation.")] = False,
    as_json: _Json = False,
) -> None:
    """How many replicas, how much memory and money a number of users needs."""
    from pingjia.cluster import plan as planning

    if balance not in ("turns", "least"):
        raise UserError(f"--balance {balance!r}: turns or least")
    traffic = planning.Traffic(users, requests_per_user, prompt_tokens, answer_tokens, cached_share)
    rate, num_seats = _rates(tokens_per_s, seats, consul, service)
    machine = planning.Machine(rate, num_seats, prefill_tokens_per_s, weights_gb, kv_gb_per_seat, price_per_hour)
    result = planning.plan(traffic, machine, max_wait_s=max_wait, max_busy=max_busy, spare=spare, balance=balance)  # type: ignore[arg-type]
    rows = _plan_rows(result, machine)
    if simulate:
        rows |= _simulated(result, traffic, machine, balance)
    if as_json:
        console.print_json(json.dumps(rows))
        return
    for name, value in rows.items():
        console.print(f"{name.replace('_', ' '):<32}{value:>14,}", markup=False)


def _consul(url: str | None) -> Consul:
    """A Consul that answers."""
    from pingjia.cluster import Consul, check_consul, from_environment

    settings = from_environment(url)
    check_consul(settings)
    return Consul(settings)


def _pool(url: str | None, service: str, timeout_s: float = 300.0) -> Pool:
    from pingjia.cluster.rollout import Pool

    return Pool(_consul(url), service, timeout_s)


def _nginx_settings(overrides: list[str], given: dict[str, Any]) -> NginxSettings:
    from pingjia.cluster.nginx import NginxSettings
    from pingjia.recipe import assign, build, split_override

    for override in overrides:
        assign(given, *split_override(override))
    return build(given, NginxSettings, flat=(), name="cluster nginx")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: {e}") from None


def _try_template(service: str, settings: NginxSettings, template: str | None) -> None:
    """A broken template is known before Consul is asked."""
    from pingjia.cluster.nginx import render
    from pingjia.cluster.replica import Replica

    render(service, [], settings, template)
    render(service, [Replica("a", "127.0.0.1", 8000, 10)], settings, template)


def _print_once(consul: Consul, service: str, settings: NginxSettings, template: str | None) -> None:
    from pingjia.cluster import read_replicas, select
    from pingjia.cluster.nginx import render

    selection = select(read_replicas(consul.health(service).body), ())
    for remark in selection.remarks:
        errors.print(remark, markup=False)
    sys.stdout.write(render(service, selection.members, settings, template))


def _refuse_taken_port(out: Path, listen: str) -> None:
    """Before the first file: nginx itself would only say so in its log, and go on with the old configuration."""
    from pingjia.gateway.server import check_port

    if not listen or out.exists():
        return
    host, _, port = listen.rpartition(":")
    if not port.isdigit() or not 1 <= int(port) <= 65_535:
        raise UserError(f"--listen {listen!r}: write PORT or ADDRESS:PORT")
    try:
        check_port(host.strip("[]") or "0.0.0.0", int(port))  # noqa: S104
    except UserError as e:
        raise UserError(str(e).replace("--port", "--listen")) from None


def _run_until_signal(watch: Watch) -> None:
    """In a thread, so that a signal need not wait for Consul's answer; a file that is being changed is finished."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())

    def run() -> None:
        try:
            watch.run()
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="watch", daemon=True)
    thread.start()
    ended.wait()
    if not thread.is_alive():
        raise RuntimeError("the watch has ended by itself")
    watch.stop()


def _row(replica: Replica, num_in_work: int | None) -> dict[str, Any]:
    return {
        "name": replica.name,
        "address": replica.authority,
        "state": replica.state.value,
        "weight": replica.weight,
        "tokens_per_s": replica.tokens_per_s,
        "in_work": num_in_work,
        "model": replica.model,
        "model_digest": replica.model_digest,
        "adapters": {a.name: a.digest for a in replica.adapters},
        "version": replica.version,
        "said": replica.complaint or replica.said,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Aligned, one line per replica, never folded: for eyes and for grep."""
    titles = ("name", "address", "state", "tokens/s", "in work", "model", "adapters", "version", "said")
    lines = [titles, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    for line in lines:
        console.print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip(), markup=False)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        row["address"],
        row["state"],
        f"{row['tokens_per_s']:.1f}",
        "?" if row["in_work"] is None else str(row["in_work"]),
        f"{row['model']}@{row['model_digest'][:8]}",
        " ".join(f"{name}@{digest[:8]}" for name, digest in row["adapters"].items()) or "-",
        row["version"],
        " ".join(row["said"].split())[:80],
    )


def _wanted(values: list[str], digest: str | None) -> dict[str, WantedAdapter | None]:
    from pingjia.cluster.orders import WantedAdapter

    wanted: dict[str, WantedAdapter | None] = {}
    for value in values:
        name, sep, path = value.partition("=")
        if not sep or not name:
            raise UserError(f"--adapter {value!r}: write NAME=DIR, or NAME= to stop serving it")
        if path and not Path(path).is_absolute():
            raise UserError(f"--adapter {value!r}: DIR lies on the replicas' disks; give its whole path")
        wanted[name] = WantedAdapter(path, digest or _digest_here(Path(path))) if path else None
    if digest and len(wanted) > 1:
        raise UserError("--digest is for one adapter; roll out one after the other")
    return wanted


def _digest_here(directory: Path) -> str:
    """Of the adapter as it lies on this machine, so that all replicas get the same one; "" when it does not."""
    import hashlib

    try:
        files = [(directory / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
    except OSError:
        errors.print(f"{directory} is not on this machine: replicas take what they find there (--digest)", markup=False)
        return ""
    return hashlib.sha256(b"\0".join(files)).hexdigest()


def _say(line: str) -> None:
    errors.print(line, markup=False)


def _rates(tokens_per_s: float | None, seats: int | None, consul: str | None, service: str) -> tuple[float, int]:
    if tokens_per_s is not None and seats is not None:
        return tokens_per_s, seats
    if consul is None:
        raise UserError("how fast is a replica? give --tokens-per-s and --seats, or --consul to ask a pool that runs")
    replicas = [r for r in _pool(consul, service).replicas() if r.tokens_per_s > 0 and r.seats > 0]
    if not replicas:
        raise UserError(f"no replica of the pool {service!r} says how fast it is; give --tokens-per-s and --seats")
    mean = sum(r.tokens_per_s for r in replicas) / len(replicas)
    return tokens_per_s or mean, seats or min(r.seats for r in replicas)


def _plan_rows(result: Plan, machine: Machine) -> dict[str, float]:
    return {
        "replicas": result.replicas,
        "of_these_spare": result.replicas - result.needed,
        "requests_per_s": round(result.requests_per_s, 3),
        "seconds_per_answer": round(result.service.mean_s, 2),
        "seats_taken": round(result.waiting.busy, 3),
        "mean_wait_s": round(result.waiting.mean_s, 3),
        "p95_wait_s": round(result.waiting.p95_s, 3),
        "memory_gb_per_replica": round(machine.memory_gb, 2),
        "memory_gb": round(result.memory_gb, 2),
        "cny_per_month": round(result.cost_per_month, 2),
    }


def _simulated(result: Plan, traffic: Any, machine: Machine, balance: str) -> dict[str, float]:
    import numpy as np

    from pingjia.cluster.simulate import Fleet, LeastLoaded, Simulation, Turns, poisson

    num = result.needed
    policy = Turns([1] * num) if balance == "turns" else LeastLoaded([1.0] * num)
    num_requests = min(1_000_000, max(20_000, 100 * num * machine.seats))
    visits = poisson(traffic, num_requests, seed=1)
    outcome = Simulation(Fleet(machine, [1.0] * num), policy).run(visits, skip=num_requests // 4)
    return {
        "simulated_requests": num_requests,
        "simulated_seats_taken": round(outcome.busy, 3),
        "simulated_mean_wait_s": round(float(outcome.waits_s.mean()), 3),
        "simulated_p95_wait_s": round(float(np.quantile(outcome.waits_s, 0.95)), 3),
    }
