"""Three times more requests than can be computed, over HTTP: goodput, deadlines, memory, the truth of Retry-After.

Usage: python benchmarks/overload.py [--out FILE] [--seconds 60] [--overload 3] [--keys 0]
A redis-server, a gateway and a worker, each a process; the worker's engine is a stub that makes one token per 10 ms in
each of its 8 seats and no faster. Clients come at random (Poisson), want 10 to 100 tokens within 10 s, and do not wait
for each other. Who is refused waits as long as Retry-After says and comes back once, with the same request. `--keys N`
spreads them over N API keys. Memory is what the processes hold resident, and Redis' own count. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
SEATS, TOKEN_S, TOKENS = 8, 0.01, (10, 100)
CAPACITY = SEATS / TOKEN_S
"""Tokens a second."""


# ---- the processes


class Stub:
    """An engine with a clock instead of a network: each token of an answer comes when its time has come."""

    def __init__(self) -> None:
        self.running = 0

    def models(self) -> list[Any]:
        from pingjia.types import ModelCard

        return [ModelCard("stub", "stub", None, 8192, 1, "s" * 64)]

    def stats(self) -> Any:
        from pingjia.types import EngineStats

        return EngineStats(num_running=self.running)

    def is_ready(self) -> bool:
        return True

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        from pingjia.types import Chunk, Usage

        self.running += 1
        try:
            started, num = time.monotonic(), request.sampling.max_tokens
            for i in range(1, num + 1):
                await asyncio.sleep(max(0.0, started + i * TOKEN_S - time.monotonic()))
                yield Chunk("x", (65,))
            yield Chunk("", finish_reason="length", usage=Usage(len(request.prompt_ids), num))
        finally:
            self.running -= 1


def be_worker(redis_url: str) -> None:
    from pingjia.queue.opening import open_queue
    from pingjia.queue.policy import Limits
    from pingjia.worker.pulling import pull

    limits = Limits()
    pull(
        Stub(),
        lambda: open_queue(redis_url, limits),
        seats=SEATS,
        lease_s=limits.lease_s,
        drain_s=1.0,
        on_ready=lambda name: print(name, flush=True),
    )


def be_gateway(redis_url: str, api_keys: str, deadline_s: str) -> None:
    from pingjia import gateway
    from pingjia.chat import load_tokenizer

    settings = gateway.GatewaySettings(
        port=0, redis_url=redis_url, deadline_s=float(deadline_s), access_log=False, drain_s=1.0,
        api_keys=tuple(filter(None, api_keys.split(","))), api_keys_env="PINGJIA_NO_KEYS",
    )  # fmt: skip
    app = gateway.create_app(None, load_tokenizer("smollm2"), settings)
    gateway.serve(app, settings, on_ready=lambda url: print(url, flush=True))


@dataclass
class House:
    """What runs, by name."""

    url: str
    redis_port: int
    processes: dict[str, subprocess.Popen[str]]

    def resident_mb(self) -> dict[str, float]:
        pages = {
            name: int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            for name, process in self.processes.items()
        }
        return {name: round(num * os.sysconf("SC_PAGE_SIZE") / 1e6, 1) for name, num in pages.items()}

    def cpu_s(self) -> dict[str, float]:
        """Processor time so far, and that of the clients (this process)."""
        own = {name: Path(f"/proc/{process.pid}/stat").read_text() for name, process in self.processes.items()}
        ticks = {name: sum(map(int, text.rpartition(")")[2].split()[11:13])) for name, text in own.items()}
        spent = {name: round(num / os.sysconf("SC_CLK_TCK"), 1) for name, num in ticks.items()}
        return {**spent, "clients": round(time.process_time(), 1)}


@contextmanager
def house(folder: Path, keys: list[str], deadline_s: float) -> Iterator[House]:
    """Everything started and ready; ended with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"redis://127.0.0.1:{port}/0", open(folder / "log", "w")  # noqa: SIM115  as long as the processes
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes"]
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        processes["redis"] = subprocess.Popen(["redis-server", *options], stdout=log, stderr=log, text=True)
        _wait_for(port)
        digests = ",".join(hashlib.sha256(key.encode()).hexdigest() for key in keys)
        processes["worker"], _ = _start(["worker", url], log)
        processes["gateway"], at = _start(["gateway", url, digests, str(deadline_s)], log)
        _until_ready(at)
        yield House(at, port, processes)
    finally:
        for process in reversed(processes.values()):
            process.kill()
            process.wait(20)
        log.close()


def _start(words: list[str], log: Any) -> tuple[subprocess.Popen[str], str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, __file__, "--as", *words], stdout=subprocess.PIPE, stderr=log, text=True, env=environ
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def _wait_for(port: int) -> None:
    end = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < end, "redis-server did not start"
            time.sleep(0.05)


def _until_ready(url: str) -> None:
    end = time.monotonic() + 30
    while httpx.get(f"{url}/health/ready").status_code != 200:
        assert time.monotonic() < end, "never ready"
        time.sleep(0.1)


# ---- the clients


@dataclass
class Load:
    """What the clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    tokens_in_time: int = 0
    max_open: int = 0
    num_open: int = 0


class Clients:
    def __init__(self, url: str, keys: list[str], *, seconds: float, overload: float, deadline_s: float) -> None:
        self.url, self.keys, self.seconds, self.deadline_s = url, keys, seconds, deadline_s
        self.rate = overload * CAPACITY / statistics.mean(TOKENS)
        self.load, self.rng = Load(), random.Random(11)
        self.started = 0.0

    async def run(self) -> Load:
        self.started, at, clients = time.monotonic(), 0.0, []
        while (at := at + self.rng.expovariate(self.rate)) < self.seconds:
            await asyncio.sleep(max(0.0, self.started + at - time.monotonic()))
            clients.append(asyncio.create_task(self.client(len(clients), self.rng.randint(*TOKENS))))
        await asyncio.gather(*clients)
        return self.load

    async def client(self, number: int, num_tokens: int) -> None:
        """Ask; if refused, wait as told and ask once more."""
        wait_s = await self.ask(number, num_tokens, "")
        if wait_s is None:
            return
        self.load.waits_s.append(wait_s)
        await asyncio.sleep(wait_s)
        when = "under load" if time.monotonic() - self.started < self.seconds else "later"
        if await self.ask(number, num_tokens, f"came back {when} and ") is not None:
            self.load.counts[f"came back {when} in vain"] += 1

    async def ask(self, number: int, num_tokens: int, prefix: str) -> float | None:
        """Seconds to wait where refused; None where taken on."""
        content = {"role": "user", "content": f"question {number}"}
        body = {"model": "stub", "messages": [content], "max_tokens": num_tokens}
        headers = {"authorization": f"Bearer {self.keys[number % len(self.keys)]}"} if self.keys else {}
        self.load.num_open += 1
        self.load.max_open = max(self.load.max_open, self.load.num_open)
        started = time.monotonic()
        try:
            status, retry_after_s = await _post(self.url, body, headers, self.deadline_s + 20)
        except (TimeoutError, OSError, EOFError, IndexError) as e:  # counted as failed below
            print(f"client {number}: {type(e).__name__} after {time.monotonic() - started:.1f} s", file=sys.stderr)
            status, retry_after_s = 0, None
        finally:
            self.load.num_open -= 1
        ended = time.monotonic()
        if status in (429, 503) and retry_after_s is not None:
            self.load.counts["refused"] += prefix == ""
            return retry_after_s
        self.load.counts[f"{prefix}got in"] += 1
        in_time = status == 200 and ended - started <= self.deadline_s
        self.load.counts["in time" if in_time else f"late or failed ({status})"] += 1
        self.load.latencies_s.append(ended - started)
        if in_time and ended - self.started <= self.seconds:
            self.load.tokens_in_time += num_tokens
        return None


async def _post(url: str, body: dict[str, Any], headers: dict[str, str], patience_s: float) -> tuple[int, float | None]:
    """Status and Retry-After. By hand: hundreds of clients in one process must not become what is measured."""
    address = urllib.parse.urlsplit(url)
    content = json.dumps(body).encode()
    fields = {"host": address.netloc, "content-type": "application/json", "content-length": len(content), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in {**fields, "connection": "close"}.items())
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + content)
        async with asyncio.timeout(patience_s):
            answer = await reader.read(-1)
    finally:
        writer.close()
    lines = answer.partition(b"\r\n\r\n")[0].decode().lower().split("\r\n")
    after = next((line.partition(":")[2] for line in lines if line.startswith("retry-after:")), None)
    return int(lines[0].split()[1]), None if after is None else float(after)


async def _watch(at: House, samples: list[dict[str, float]]) -> None:
    while True:
        samples.append(at.resident_mb())
        await asyncio.sleep(1.0)


def measure(seconds: float, overload: float, num_keys: int, deadline_s: float = 10.0) -> dict[str, Any]:
    """The whole run, as the result file has it."""
    keys = [f"sk-{number}" for number in range(num_keys)]
    samples: list[dict[str, float]] = []

    async def run(at: House) -> Load:
        watching = asyncio.create_task(_watch(at, samples))
        load = await Clients(at.url, keys, seconds=seconds, overload=overload, deadline_s=deadline_s).run()
        watching.cancel()
        return load

    with tempfile.TemporaryDirectory() as folder, house(Path(folder), keys, deadline_s) as at:
        load = asyncio.run(run(at))
        cpu_s = at.cpu_s()
    asked = {"seconds": seconds, "overload": overload, "num_keys": num_keys, "deadline_s": deadline_s}
    return {**asked, **_figures(load, seconds), **_grown(samples), "cpu_s": cpu_s}


def _figures(load: Load, seconds: float) -> dict[str, Any]:
    counts = load.counts
    came = {
        when: (counts[f"came back {when} and got in"], counts[f"came back {when} in vain"])
        for when in ("under load", "later")
    }
    back, vain = (sum(pair[i] for pair in came.values()) for i in (0, 1))
    taken = counts["got in"] + back
    return {
        "goodput": round(load.tokens_in_time / (seconds * CAPACITY), 4),
        "in_time": round(counts["in time"] / taken, 4),
        "got_in_after_waiting": round(back / max(1, back + vain), 4),
        "got_in_after_waiting_under_load": round(came["under load"][0] / max(1, sum(came["under load"])), 4),
        "asked": counts["got in"] + counts["refused"],
        "taken": taken,
        "latency_s": {
            "median": round(statistics.median(load.latencies_s), 3),
            "p95": round(statistics.quantiles(load.latencies_s, n=20)[-1], 3),
        },
        "retry_after_s": {"median": statistics.median(load.waits_s or [0]), "max": max(load.waits_s, default=0)},
        "max_open_connections": load.max_open,
        "counts": dict(sorted(counts.items())),
    }


def _grown(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the second quarter of the run and of its last one."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    return {
        "resident_mb": {
            name: {
                "early": round(statistics.median(s[name] for s in early), 1),
                "late": round(statistics.median(s[name] for s in late), 1),
            }
            for name in samples[0]
        }
    }


def _conditions() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "capacity_tokens_per_s": CAPACITY,
    }


def main() -> None:
    if sys.argv[1:2] == ["--as"]:
        {"worker": be_worker, "gateway": be_gateway}[sys.argv[2]](*sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "overload.json")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--overload", type=float, default=3.0)
    parser.add_argument("--keys", type=int, default=0)
    args = parser.parse_args()
    result = {**_conditions(), **measure(args.seconds, args.overload, args.keys)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
