"""The whole service under faults: a thousand jobs and their bill, a full disk, clocks, a frozen worker, drains."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from pingjia.ledger import Ledger
from pingjia.queue.backend import QueueBackend
from pingjia.queue.job import Job
from pingjia.queue.policy import Limits
from pingjia.types import Request, Sampling

sys.path.insert(0, str(Path(__file__).parent))
from scripted_worker import answer_ids

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
ASYNC = {"prefer": "respond-async"}


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready").status_code == 200
    except httpx.TransportError:
        return False


# ---- a thousand jobs


async def accept(url: str, num: int) -> list[str]:
    """Where the jobs are that were taken on. Whoever is not answered was not promised anything."""
    found: list[str] = []

    async def few(client: httpx.AsyncClient, numbers: range) -> None:
        for number in numbers:
            body = {**CHAT, "max_tokens": 3 + number % 8, "seed": number}
            response = await client.post("/v1/chat/completions", json=body, headers=ASYNC)
            assert response.status_code == 202, response.text
            found.append(response.headers["location"])

    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        await asyncio.gather(*(few(client, range(start, num, 8)) for start in range(8)))
    return found


async def ends(url: str, jobs: list[str]) -> dict[str, dict]:
    """Every job as it ended."""
    ended: dict[str, dict] = {}

    async def few(client: httpx.AsyncClient, some: list[str]) -> None:
        for job in some:
            while (state := (await client.get(job)).json())["status"] in ("queued", "running"):
                await asyncio.sleep(0.1)
            ended[job] = state

    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        await asyncio.gather(*(few(client, jobs[start::8]) for start in range(8)))
    return ended


async def test_a_thousand_jobs_and_their_bill_when_everything_dies_once(processes, eventually, tmp_path):
    """Each is answered once and stands once in the ledger, though its gateway, its worker and Redis were killed."""
    ledger = tmp_path / "ledger.jsonl"
    gateway, url = processes.gateway(ledger)
    workers = [processes.worker(seats=4) for _ in range(2)]
    await asyncio.to_thread(eventually, lambda: is_ready(url), "a worker is there")
    workers[0].send_signal(signal.SIGSTOP)  # so that most of it still waits when things begin to die
    jobs = await accept(url, 1000)
    workers[0].send_signal(signal.SIGKILL)
    gateway.send_signal(signal.SIGKILL)
    await asyncio.to_thread(gateway.wait, 10)
    processes.redis.kill()
    await asyncio.to_thread(processes.redis.start)
    _, url = await asyncio.to_thread(lambda: processes.gateway(ledger))
    for _ in range(2):
        await asyncio.to_thread(lambda: processes.worker(seats=48))
    ended = await asyncio.wait_for(ends(url, jobs), 90)
    assert Counter(state["status"] for state in ended.values()) == {"completed": 1000}
    tokens = Counter(state["result"]["usage"]["completion_tokens"] for state in ended.values())
    assert tokens == Counter(3 + number % 8 for number in range(1000))
    facts = lambda: [fact.note["job"] for fact in Ledger(ledger).read(kind="serve.request")]  # noqa: E731
    await asyncio.to_thread(eventually, lambda: len(facts()) >= 1000, "all are accounted for", 40)
    assert Counter(facts()) == Counter(job.removeprefix("/v1/jobs/") for job in jobs)
    spent = sum(fact.note["share_s"] for fact in Ledger(ledger).read(kind="serve.request"))
    assert spent > 0, "the workers said what it took"


def test_two_gateways_write_one_fact_each(processes, eventually, tmp_path):
    """The other gateway is alive all the time and takes over what the dead one had promised to account for."""
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    gateway, url = processes.gateway(first)
    _, other = processes.gateway(second)
    processes.worker(seats=2, token_s=0.01)
    eventually(lambda: is_ready(url), "a worker is there")
    jobs = [
        httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "max_tokens": 20 + i}, headers=ASYNC).headers["location"]
        for i in range(20)
    ]
    eventually(lambda: first.exists(), "the first jobs are done")
    gateway.send_signal(signal.SIGKILL)
    ids = lambda: [f.note["job"] for file in (first, second) for f in Ledger(file).read(kind="serve.request")]  # noqa: E731
    eventually(lambda: len(ids()) >= 20, "all are accounted for", 30)
    time.sleep(1.0)
    assert Counter(ids()) == Counter(job.removeprefix("/v1/jobs/") for job in jobs)
    assert len(list(Ledger(second).read())) > 0
    assert httpx.get(f"{other}{jobs[-1]}").json()["status"] == "completed"


# ---- a full disk


def test_a_disk_that_fills_up_while_a_batch_is_written(processes, eventually):
    """The file may not grow: the batch fails with the reason, keeps what was answered, and the service lives."""
    _, url = processes.gateway("", 4_000)
    processes.worker(seats=4, token_s=0.001)
    eventually(lambda: is_ready(url), "a worker is there")
    rows = [{"custom_id": f"c{i}", "method": "POST", "body": CHAT | {"max_tokens": 40}} for i in range(30)]
    content = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    assert len(content) < 4_000
    file = httpx.post(f"{url}/v1/files", files={"file": ("in", content)}, data={"purpose": "batch"}).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions"}
    batch = httpx.post(f"{url}/v1/batches", json=body).json()
    where = f"{url}/v1/batches/{batch['id']}"
    eventually(lambda: httpx.get(where).json()["status"] in ("failed", "completed"), "the batch ends", 30)
    batch = httpx.get(where).json()
    assert batch["status"] == "failed"
    assert "large" in json.dumps(batch["errors"]).lower() or "disk" in json.dumps(batch["errors"]).lower(), batch
    too_large = httpx.post(f"{url}/v1/files", files={"file": ("in", "x" * 9_000)}, data={"purpose": "batch"})
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (507, "storage_full")
    answer = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "max_tokens": 3}, timeout=20)
    assert answer.json()["usage"]["completion_tokens"] == 3


# ---- clocks


SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long *shift;
static long by(void) {
    if (!shift) shift = mmap(0, 8, PROT_READ, MAP_SHARED, open(getenv("SHIFT_FILE"), O_RDONLY), 0);
    return *shift;
}
int gettimeofday(struct timeval *t, void *zone) {
    long r = syscall(SYS_gettimeofday, t, zone);
    t->tv_sec += by();
    return r;
}
int clock_gettime(clockid_t id, struct timespec *t) {
    long r = syscall(SYS_clock_gettime, id, t);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) t->tv_sec += by();
    return r;
}
time_t time(time_t *out) {
    struct timeval t;
    gettimeofday(&t, 0);
    if (out) *out = t.tv_sec;
    return t.tv_sec;
}
"""


class JumpingRedis:
    """A redis-server whose wall clock a test moves while it runs (libfaketime does not get on with its jemalloc)."""

    def __init__(self, folder: Path, port: int) -> None:
        if shutil.which("cc") is None or shutil.which("redis-server") is None:
            pytest.skip("NOT TESTED: redis-server or a C compiler is missing; see tests/debian-packages.txt")
        (folder / "shim.c").write_text(SHIM)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", folder / "shim.so", folder / "shim.c"], check=True)
        self.shift = folder / "shift"
        self.shift.write_bytes((0).to_bytes(8, "little"))
        environ = {**os.environ, "LD_PRELOAD": str(folder / "shim.so"), "SHIFT_FILE": str(self.shift)}
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        self.process = subprocess.Popen(["redis-server", *options], env=environ, stdout=subprocess.DEVNULL)
        self.url = f"redis://127.0.0.1:{port}/0"

    def jump(self, seconds: int) -> None:
        with open(self.shift, "r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))


@pytest.fixture
def jumping(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = JumpingRedis(tmp_path, port)
    end = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.05)
    yield server
    server.process.kill()
    server.process.wait(20)


@pytest.mark.parametrize("jump_s", [3600, -3600])
async def test_the_clock_of_redis_jumps(jumping, tmp_path, jump_s):
    """Ahead: leases are over, requests are computed again and answered once, or expire aloud. Back: they go on."""
    from scripted_worker import ScriptedBackend

    from pingjia.queue.puller import Puller
    from pingjia.queue.streams import StreamQueue

    limits = Limits(lease_s=1.0, max_deliveries=10)
    asking, *working = (StreamQueue(jumping.url, limits) for _ in range(3))
    clock = await asking._redis.time()
    pullers = [
        Puller(queue, ScriptedBackend(0.01, str(tmp_path / "log")), name=f"w{i}", seats=6, beat_s=0.2)
        for i, queue in enumerate(working)
    ]
    running = [asyncio.create_task(puller.run()) for puller in pullers]
    jobs = [
        Job(Request(f"r{i}", (5 + i,), Sampling(max_tokens=10 + i % 20)), deadline_s=600.0 if i % 2 else 9_000.0)
        for i in range(60)
    ]
    await asking.submit(jobs)
    reading = [asyncio.create_task(read(QueueBackend(asking, owner=""), job)) for job in jobs]
    await asyncio.sleep(0.15)
    jumping.jump(jump_s)
    moved = (await asking._redis.time())[0] - clock[0]
    assert abs(moved - jump_s) < 60, "the clock did not jump: the test proves nothing"
    results = await asyncio.wait_for(asyncio.gather(*reading), 60)
    ended = Counter()
    for job, result in zip(jobs, results, strict=True):
        if isinstance(result, Exception):
            assert jump_s > 0
            assert "deadline" in str(result)
            ended["expired"] += 1
        else:
            assert result == answer_ids(job.request), "once, and whole"
            ended["done"] += 1
    assert (await asking.stats()).ended == {how: num for how, num in ended.items() if num}
    assert ended["done"] >= 30, "those with time enough are answered"
    for puller in pullers:
        await puller.drain(1.0)
    await asyncio.gather(*running)
    await asking.close()


async def read(backend: QueueBackend, job: Job) -> list[int] | Exception:
    try:
        return [token async for chunk in backend.stream(job.request) for token in chunk.token_ids]
    except Exception as e:
        return e


# ---- frozen, and stopping


def test_a_frozen_worker_makes_the_gateway_not_ready(processes, eventually):
    """Within three seconds, the issue of a whole lease: nothing new is promised meanwhile."""
    _, url = processes.gateway(lease_s=10.0)
    worker = processes.worker(seats=2, lease_s=10.0)
    eventually(lambda: is_ready(url), "a worker is there")
    worker.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    eventually(lambda: not is_ready(url), "the gateway says so", 9.0)
    took_s = time.monotonic() - started
    worker.send_signal(signal.SIGCONT)
    eventually(lambda: is_ready(url), "and when it is back")
    assert took_s < 5.0, "3 s, and slack for a busy machine; the lease alone would take 10"


def test_a_gateway_that_is_told_to_stop_finishes_what_waits_in_the_queue(processes, eventually):
    """SIGTERM with requests in the queue: readiness drops, every one that was taken on is answered, then it ends."""
    gateway, url = processes.gateway(lease_s=10.0)
    processes.worker(seats=2, token_s=0.01, lease_s=10.0)
    eventually(lambda: is_ready(url), "a worker is there")
    answers: list[httpx.Response] = []

    def ask(number: int) -> None:
        body = {**CHAT, "max_tokens": 20, "seed": number, "stream": number % 2 == 0}
        answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    eventually(lambda: httpx.get(f"{url}/health/live").status_code == 200 and len(processes.tokens()) > 5, "it began")
    time.sleep(0.3)
    gateway.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(30)
    assert gateway.wait(20) == 0
    assert [answer.status_code for answer in answers] == [200] * 16, [
        a.text[:300] for a in answers if a.status_code != 200
    ][:1]
    for answer in answers:
        if answer.headers["content-type"].startswith("application/json"):
            assert answer.json()["usage"]["completion_tokens"] == 20
        else:
            assert answer.text.rstrip().endswith("data: [DONE]")
            assert "error" not in answer.text
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health/live", timeout=2)
