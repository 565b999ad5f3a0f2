"""Four replicas behind nginx and Consul under steady load, and what goes wrong in a data centre.

Usage: python benchmarks/cluster.py [--out benchmarks/results/cluster.json] [--short] [--only PART]
Replicas are the real HTTP API over an engine of a fixed rate (chain/stub.py), so that two cores suffice; three of them
make 200 tokens a second, one 100. Half of the requests stream. Needs nginx and Consul (tests/debian-packages.txt).
The last line is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "chain"))

from load import Asked, Clients, shares  # noqa: E402
from servers import ConsulServer, Nginx, Processes, Replicas, Wire, missing, until  # noqa: E402

RATES = {"r0": 200.0, "r1": 200.0, "r2": 200.0, "r3": 100.0}
TOKENS = 40
LOAD = 0.55  # of all replicas' rates: what is left must suffice without one of them


class Chain:
    """Consul, replicas, nginx and the watch between them. `wired`: a replica whose way to Consul can be cut."""

    def __init__(self, directory: Path, rates: dict[str, float], *, wired: str = "", **settings: Any) -> None:
        self.processes = Processes(directory)
        try:
            self._start(rates, wired, settings)
        except BaseException:
            self.processes.stop()
            raise

    def _start(self, rates: dict[str, float], wired: str, settings: dict[str, Any]) -> None:
        self.consul = ConsulServer(self.processes)
        self.consul.start()
        self.wire = Wire(self.consul.host, self.consul.http)
        self.replicas = Replicas(self.processes, self.consul.url, **settings)
        for name, rate in rates.items():
            consul = {"consul": self.wire.url} if name == wired else {}
            self.replicas.start(name, tokens_per_s=rate, wait=False, **consul)
        self.nginx = Nginx(self.processes)
        until(lambda: self.status().count("passing") == len(rates), "all replicas in the pool", 60.0)
        self.nginx.watch(self.consul.url)
        self.nginx.start()
        until(lambda: len(self.nginx.weights()) == len(rates), "all replicas in nginx")
        time.sleep(1.0)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`pingjia cluster ...`"""
        line = [sys.executable, "-m", "pingjia.cli.main", "cluster", *words, "--consul", self.consul.url]
        env = {**os.environ, "XDG_STATE_HOME": str(self.processes.directory), "PYTHONPATH": str(ROOT)}
        return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=env, check=False)

    def status(self) -> list[str]:
        """The states of all replicas."""
        import httpx

        from pingjia.cluster.replica import read_replicas

        entries = httpx.get(f"{self.consul.url}/v1/health/service/pingjia", trust_env=False).json()
        return [replica.state.value for replica in read_replicas(entries)]

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.replicas.given[name].port}"

    def in_work(self, name: str) -> int:
        import httpx

        body = httpx.get(f"http://{self.address(name)}/health", trust_env=False).json()
        return int(body["num_running"] + body["num_waiting"])

    def until_out(self, name: str) -> float:
        """Seconds until nginx sends it nothing more."""
        began = time.monotonic()
        until(lambda: name not in self.nginx.weights(), f"{name} out of nginx", every_s=0.02)
        return round(time.monotonic() - began, 2)

    def until_in(self, name: str) -> float:
        began = time.monotonic()
        until(lambda: name in self.nginx.weights(), f"{name} in nginx", 60.0, every_s=0.02)
        return round(time.monotonic() - began, 2)

    def close(self) -> None:
        self.wire.close()
        self.replicas.stop_restarted()
        self.processes.stop()


def off(found: dict[str, float], rates: dict[str, float], chain: Chain) -> float:
    """The largest deviation of a replica's share from its part of the capacity, relative to that."""
    total = sum(rates.values())
    return max(abs(found.get(chain.address(n), 0.0) / (rate / total) - 1.0) for n, rate in rates.items())


def row(what: str, asked: list[Asked], **more: Any) -> dict[str, Any]:
    """One line of the table."""
    failed = [one for one in asked if one.error]
    times = sorted(one.ended_s - one.began_s for one in asked)
    made = {"what": what, "requests": len(asked), "failed": len(failed), **more}
    made["p50_s"] = round(statistics.median(times), 3)
    made["p99_s"] = round(times[int(len(times) * 0.99)], 3)
    made["errors"] = sorted({one.error for one in failed})
    print(json.dumps(made, ensure_ascii=False), flush=True)
    return made


def under_load(chain: Chain, what: str, act: Callable[[], dict[str, Any]], settle_s: float = 3.0) -> dict[str, Any]:
    """Do something while requests come at a steady rate, and see what became of all of them."""
    clients = Clients(chain.nginx.url, tokens=TOKENS).steady(LOAD * sum(RATES.values()) / TOKENS)
    time.sleep(settle_s)
    found = act()
    time.sleep(settle_s)
    found |= {"asked": clients.stop()}
    asked = found.pop("asked")
    return row(what, asked, **found)


def steady(chain: Chain, seconds: float) -> dict[str, Any]:
    clients = Clients(chain.nginx.url, tokens=TOKENS).steady(LOAD * sum(RATES.values()) / TOKENS)
    time.sleep(seconds)
    asked = clients.stop()
    return row("steady load", asked, share_off=round(off(shares(asked), RATES, chain), 3))


def killed(chain: Chain) -> dict[str, Any]:
    def act() -> dict[str, Any]:
        in_work = until(lambda: chain.in_work("r0"), "something in its hands")
        chain.replicas.signal("r0", signal.SIGKILL)
        out_s = chain.until_out("r0")
        chain.replicas.of["r0"].wait()
        chain.replicas.start("r0")
        chain.until_in("r0")
        return {"in_work_when_killed": in_work, "out_after_s": out_s}

    return under_load(chain, "kill -9 one", act)


def frozen(chain: Chain, for_s: float = 8.0) -> dict[str, Any]:
    def act() -> dict[str, Any]:
        began = time.monotonic()
        chain.replicas.signal("r1", signal.SIGSTOP)
        out_s = chain.until_out("r1")
        time.sleep(max(0.0, for_s - (time.monotonic() - began)))
        chain.replicas.signal("r1", signal.SIGCONT)
        return {"out_after_s": out_s, "frozen_for_s": for_s, "in_again_after_s": chain.until_in("r1")}

    return under_load(chain, "freeze one (SIGSTOP)", act)


def slowed(chain: Chain, seconds: float) -> dict[str, Any]:
    """r2 makes half as many tokens; the shares are those of the time after nginx knows."""
    now = {**RATES, "r2": RATES["r2"] / 2}
    clients = Clients(chain.nginx.url, tokens=TOKENS).steady(0.5 * sum(now.values()) / TOKENS)
    time.sleep(2.0)
    began = time.monotonic()
    chain.replicas.signal("r2", signal.SIGUSR1)
    goal = now["r2"] * 10
    until(lambda: abs(chain.nginx.weights().get("r2", 0) / goal - 1) < 0.08, "a lower weight", 90.0)
    noticed_s, start = round(time.monotonic() - began, 1), time.monotonic()
    time.sleep(seconds)
    later = clients.between(start, time.monotonic())
    asked = clients.stop()
    chain.replicas.signal("r2", signal.SIGUSR2)
    return row("slow one down to half", asked, weight_follows_after_s=noticed_s,
               share_off=round(off(shares(later), now, chain), 3))  # fmt: skip


def cut_off(chain: Chain) -> dict[str, Any]:
    def act() -> dict[str, Any]:
        chain.wire.cut()
        out_s = chain.until_out("r3")
        time.sleep(2.0)
        chain.wire.mend()
        return {"out_after_s": out_s, "in_again_after_s": chain.until_in("r3")}

    return under_load(chain, "partition one from Consul", act)


def consul_restarted(chain: Chain, *, forgets: bool) -> dict[str, Any]:
    seen: set[int] = set()

    def act() -> dict[str, Any]:
        chain.consul.stop()
        time.sleep(2.0)
        if forgets:
            chain.consul.forget()
        chain.consul.start()
        end = time.monotonic() + 12.0
        while time.monotonic() < end:
            seen.add(len(chain.nginx.weights()))
            time.sleep(0.05)
        until(lambda: chain.status().count("passing") == len(RATES), "all replicas written down again", 30.0)
        return {"fewest_replicas_in_nginx": min(seen)}

    what = "restart Consul, all its data lost" if forgets else "restart Consul"
    return under_load(chain, what, act)


def rolled(chain: Chain) -> dict[str, Any]:
    def act() -> dict[str, Any]:
        began = time.monotonic()
        done = chain.command("rollout", "--restart", chain.replicas.restart_command, "--timeout", "60")
        assert done.returncode == 0, done.stderr[-2000:]
        return {"took_s": round(time.monotonic() - began, 1)}

    return under_load(chain, "rolling restart of all", act)


def faults(short: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="pingjia-chain-") as directory:
        chain = Chain(Path(directory), RATES, wired="r3")
        try:
            return [
                steady(chain, 10.0 if short else 30.0),
                killed(chain),
                frozen(chain),
                slowed(chain, 10.0 if short else 30.0),
                cut_off(chain),
                consul_restarted(chain, forgets=False),
                consul_restarted(chain, forgets=True),
                rolled(chain),
            ]
        finally:
            chain.close()


def scaling(seconds: float, rate: float = 100.0) -> list[dict[str, Any]]:
    """Tokens a second through the whole chain, with as many clients as the seats can hold."""
    rows = []
    for num in (1, 2, 4):
        with tempfile.TemporaryDirectory(prefix="pingjia-chain-") as directory:
            chain = Chain(Path(directory), {f"r{i}": rate for i in range(num)})
            try:
                clients = Clients(chain.nginx.url, tokens=TOKENS).crowd(12 * num)
                time.sleep(3.0)
                start = time.monotonic()
                time.sleep(seconds)
                end = time.monotonic()
                asked = clients.stop()
            finally:
                chain.close()
        # An answer counts as much as its part within the window.
        made = sum(
            one.tokens * max(0.0, min(one.ended_s, end) - max(one.began_s, start)) / (one.ended_s - one.began_s)
            for one in asked
        )
        rows.append(
            {
                "replicas": num,
                "tokens_per_s": round(made / (end - start), 1),
                "failed": sum(bool(a.error) for a in asked),
            }
        )
        rows[-1]["linear"] = round(rows[-1]["tokens_per_s"] / (rows[0]["tokens_per_s"] * num), 3)
        print(json.dumps(rows[-1]), flush=True)
    return rows


def overhead(num: int) -> dict[str, Any]:
    """Median milliseconds of a one-token answer, whose engine takes none: through nginx and gateway, and gateway alone.

    In batches of fifty, taken in turn; the quietest batch is what the chain takes when nobody else wants the machine.
    """
    with tempfile.TemporaryDirectory(prefix="pingjia-chain-") as directory:
        chain = Chain(Path(directory), {"r0": 1e5})
        try:
            ports = {"nginx_and_gateway": chain.nginx.port, "gateway": chain.replicas.given["r0"].port}
            batches = [{what: _times_ms(port, 50) for what, port in ports.items()} for _ in range(num // 50)]
        finally:
            chain.close()
    found: dict[str, Any] = {"requests": num}
    for what in ports:
        found[f"{what}_ms"] = round(statistics.median(t for batch in batches for t in batch[what]), 2)
        found[f"{what}_quietest_ms"] = round(min(statistics.median(batch[what]) for batch in batches), 2)
    print(json.dumps(found), flush=True)
    return found


def _times_ms(port: int, num: int) -> list[float]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1})
    times = []
    for _ in range(num + 5):
        began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        assert connection.getresponse().read().startswith(b'{"id"')
        times.append(1000 * (time.perf_counter() - began))
    return times[5:]


def planned(short: bool) -> list[dict[str, Any]]:
    """The formulas beside a simulation of the same policies, up to ten thousand replicas."""
    import numpy as np

    from pingjia.cluster.plan import Machine, Traffic, service_of, waiting_in_pool
    from pingjia.cluster.simulate import Fleet, LeastLoaded, Simulation, Turns, poisson

    machine, rows = Machine(80.0, 8, 400.0), []
    for num, busy in ((4, 0.7), (4, 0.85), (100, 0.85), (10_000, 0.85)):
        traffic = Traffic(1, 1.0, 200.0, 100.0)
        per_s = busy * num * machine.seats / service_of(traffic, machine).mean_s
        traffic = Traffic(round(per_s * 3600), 1.0, 200.0, 100.0)
        requests = max(200_000, (30 if short else 160) * num)
        for balance, policy in (("turns", Turns([1] * num)), ("least", LeastLoaded([1.0] * num))):
            began = time.perf_counter()
            outcome = Simulation(Fleet(machine, [1.0] * num), policy).run(
                poisson(traffic, requests, 1), skip=requests // 2
            )
            formula = waiting_in_pool(num, traffic, machine, balance)  # type: ignore[arg-type]
            rows.append({
                "replicas": num, "policy": balance, "requests": requests,
                "mean_wait_s": [round(formula.mean_s, 3), round(float(outcome.waits_s.mean()), 3)],
                "p95_wait_s": [round(formula.p95_s, 2), round(float(np.quantile(outcome.waits_s, 0.95)), 2)],
                "busy": [round(formula.busy, 3), round(outcome.busy, 3)],
                "simulated_in_s": round(time.perf_counter() - began, 1),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", choices=("faults", "scaling", "overhead", "plan"))
    given = parser.parse_args()
    lacking = missing("consul", "nginx")
    if lacking and given.only != "plan":
        print(
            f"left out: {', '.join(lacking)} not installed (tests/install-debian-packages.sh tests/debian-packages.txt)"
        )
        return
    parts: dict[str, Callable[[], Any]] = {
        "faults": lambda: faults(given.short),
        "scaling": lambda: scaling(6.0 if given.short else 15.0),
        "overhead": lambda: overhead(200 if given.short else 1000),
        "plan": lambda: planned(given.short),
    }
    found = {name: part() for name, part in parts.items() if given.only in (None, name)}
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    cpu = cpu.partition(": ")[2]
    about = {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": cpu,
        "cores": os.cpu_count(),
    }
    result = {**about, "python": platform.python_version(), "load_1min": os.getloadavg()[0], **found}
    if given.out:
        given.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
