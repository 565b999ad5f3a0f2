"""What the gateway adds before another server: milliseconds and CPU time a request, beside asking that server directly.

    python benchmarks/upstream.py [--requests N] [--out FILE]

The server is the tests' stub in a process of its own: 20 pieces without a pause. One client, one request at a time,
direct and through the gateway in turns. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parents[1]
_STUB = """
import sys, time
sys.path.insert(0, sys.argv[1])
import upstream_stub
stub = upstream_stub.Stub()
stub.act = upstream_stub.Act(pieces=("hello ",) * 20)
print(stub.url, flush=True)
time.sleep(3600)
"""
_WARM_UP = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "upstream.json")
    options = parser.parse_args()
    words = [sys.executable, "-c", _STUB, str(ROOT / "tests" / "gateway")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as stub:
        assert stub.stdout is not None
        try:
            result = _measure(stub.stdout.readline().strip(), options.requests)
        finally:
            stub.kill()
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _measure(direct: str, num: int) -> dict[str, Any]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("pingjia"))]
    quiet = ["--set", "serve.access_log=false", "--set", "serve.queue_above_rps=1000000"]
    words = [*command, "gateway", "--upstream", direct, "--port", str(port), *quiet]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as gateway:
        try:
            _wait(port)
            through = f"http://127.0.0.1:{port}/v1"
            rows = {name: asyncio.run(_both(direct, through, name == "streamed", num, gateway.pid))
                    for name in ("streamed", "whole")}  # fmt: skip
        finally:
            gateway.terminate()
            gateway.wait()
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "cpus": os.cpu_count(), "load": os.getloadavg()[0],
            "requests": num, "pieces": 20, **rows}  # fmt: skip


async def _both(direct: str, through: str, stream: bool, num: int, pid: int) -> dict[str, float]:
    async with aiohttp.ClientSession() as session:
        for _ in range(_WARM_UP):
            await _ask(session, through, stream)
        times: dict[str, list[tuple[float, float]]] = {"direct": [], "through": []}
        spent = _cpu_s(pid)
        for _ in range(num):
            times["direct"].append(await _ask(session, direct, True))
            times["through"].append(await _ask(session, through, stream))
    medians = {k: [statistics.median(column) * 1e3 for column in zip(*rows, strict=True)] for k, rows in times.items()}
    return {
        "direct_ms": round(medians["direct"][1], 3),
        "through_ms": round(medians["through"][1], 3),
        "added_ms": round(medians["through"][1] - medians["direct"][1], 3),
        "added_to_first_byte_ms": round(medians["through"][0] - medians["direct"][0], 3),
        "gateway_cpu_ms": round((_cpu_s(pid) - spent) / num * 1e3, 3),
    }


async def _ask(session: aiohttp.ClientSession, url: str, stream: bool) -> tuple[float, float]:
    """Seconds to the first byte and to the last."""
    messages = [{"role": "user", "content": "x" * 500}]
    body = {"model": "big", "messages": messages, "temperature": 1, "max_tokens": 50, "stream": stream}
    started, first = time.perf_counter(), 0.0
    async with session.post(f"{url}/chat/completions", json=body) as response:
        assert response.status == 200
        async for _ in response.content.iter_any():
            first = first or time.perf_counter() - started
    return first, time.perf_counter() - started


def _cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _wait(port: int) -> None:
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the gateway did not start")


if __name__ == "__main__":
    main()
