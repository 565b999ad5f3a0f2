"""Workers, Redis and gateways die, clients go, clocks jump: every accepted request is answered once or fails aloud."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import aclosing, suppress
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from pingjia.queue.backend import QueueBackend
from pingjia.queue.job import Job
from pingjia.queue.policy import Limits
from pingjia.types import Chunk, Request, Sampling

sys.path.insert(0, str(Path(__file__).parent))
from scripted_worker import ScriptedBackend, answer_ids

NUM = 1000
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}


def make_jobs(num: int, tokens: tuple[int, int] = (3, 12), **fields) -> list[Job]:
    rng = random.Random(3)
    return [
        Job(
            Request(f"r{i}", tuple(rng.choices(range(3, 200), k=5)), Sampling(max_tokens=rng.randint(*tokens))),
            **fields,
        )
        for i in range(num)
    ]


def open_stream(processes, **limits):
    from pingjia.queue.streams import StreamQueue

    limits = Limits(**{"lease_s": 1.0, "max_requests": 100_000, "max_units": 10**9, "max_deliveries": 10, **limits})
    return StreamQueue(processes.redis.url, limits, prefix=processes.prefix, patience_s=20.0)


async def read(backend: QueueBackend, job: Job) -> list[Chunk]:
    return [chunk async for chunk in backend.stream(job.request)]


def assert_whole(job: Job, chunks: list[Chunk]) -> None:
    ids = [i for chunk in chunks for i in chunk.token_ids]
    assert ids == answer_ids(job.request)
    assert "".join(chunk.text for chunk in chunks) == "".join(chr(i - 3) for i in ids)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]


async def test_a_thousand_jobs_while_workers_are_killed_and_redis_is_restarted(processes):
    workers = [processes.worker(seats=24) for _ in range(2)]
    queue = open_stream(processes)
    backend, jobs = QueueBackend(queue, owner=""), make_jobs(NUM)
    for start in range(0, NUM, 100):
        await queue.submit(jobs[start : start + 100])
    reading = [asyncio.create_task(read(backend, job)) for job in jobs]

    async def disturb() -> None:
        for round_ in range(3):
            await asyncio.sleep(0.7)
            victim = workers.pop(0)
            victim.send_signal(signal.SIGKILL)
            if round_ == 1:
                await asyncio.to_thread(processes.redis.kill)
                await asyncio.sleep(0.3)
                await asyncio.to_thread(processes.redis.start)
            workers.append(await asyncio.to_thread(lambda: processes.worker(seats=24)))

    await disturb()
    answers = await asyncio.wait_for(asyncio.gather(*reading), 60)
    for job, chunks in zip(jobs, answers, strict=True):
        assert_whole(job, chunks)
    stats = await queue.stats()
    assert stats.ended == {"done": NUM}
    assert (stats.num_waiting, stats.units_waiting, stats.num_claimed) == (0, 0, 0)
    assert stats.num_redelivered > 0, "nothing was disturbed"
    assert len(processes.tokens()) > sum(len(answer_ids(job.request)) for job in jobs), "nothing was computed twice"
    await queue.close()


async def test_a_frozen_worker_that_wakes_up_has_no_say(processes):
    frozen = processes.worker(seats=8, token_s=0.05)
    queue = open_stream(processes)
    jobs = make_jobs(8, tokens=(20, 20))
    await queue.submit(jobs)
    reading = [asyncio.create_task(read(QueueBackend(queue, owner=""), job)) for job in jobs]
    await asyncio.sleep(0.4)
    frozen.send_signal(signal.SIGSTOP)
    await asyncio.to_thread(lambda: processes.worker(seats=8, token_s=0.05))
    await asyncio.sleep(1.3)
    frozen.send_signal(signal.SIGCONT)
    for job, chunks in zip(jobs, await asyncio.wait_for(asyncio.gather(*reading), 30), strict=True):
        assert_whole(job, chunks)
    assert (await queue.stats()).ended == {"done": 8}
    await queue.close()


async def test_a_request_that_kills_its_workers_fails_with_the_reason(processes):
    queue = open_stream(processes, lease_s=0.4, max_deliveries=2)
    (job,) = make_jobs(1, tokens=(500, 500))
    await queue.submit([job])
    reading = asyncio.create_task(read(QueueBackend(queue, owner=""), job))
    for _ in range(2):
        (claim,) = await queue.claim("dies", 1, 0.0)
        assert await queue.publish(claim, 1, (Chunk("x", (1,)),))
        await asyncio.sleep(0.5)
    assert await queue.claim("lives", 1, 0.0) == []
    with pytest.raises(Exception, match="2 workers ended while they worked on it"):
        await asyncio.wait_for(reading, 10)
    await queue.close()


async def test_a_worker_that_is_told_to_stop_finishes_and_gives_back(processes):
    """SIGTERM: what fits into the drain is finished, nothing is computed twice, and nothing counts as a death."""
    worker = processes.worker(seats=4, token_s=0.01)
    queue = open_stream(processes)
    jobs = make_jobs(12, tokens=(30, 30))
    await queue.submit(jobs)
    reading = [asyncio.create_task(read(QueueBackend(queue, owner=""), job)) for job in jobs]
    await asyncio.sleep(0.15)
    worker.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(worker.wait, 15) == 0
    assert (await queue.stats()).ended == {"done": 4}
    assert (await queue.stats()).workers == ()
    processes.worker(seats=8)
    for job, chunks in zip(jobs, await asyncio.wait_for(asyncio.gather(*reading), 30), strict=True):
        assert_whole(job, chunks)
    assert len(processes.tokens()) == 12 * 30
    assert (await queue.stats()).num_redelivered == 0
    await queue.close()


def test_a_killed_gateway_loses_no_accepted_job(processes, eventually):
    """Asynchronous jobs are answered through the next gateway; what only its clients wanted is not begun."""
    gateway, url = processes.gateway()
    worker = processes.worker(seats=2, token_s=0.01)
    eventually(lambda: httpx.get(f"{url}/health/ready").status_code == 200, "a worker is there")
    with httpx.Client(base_url=url, headers={"prefer": "respond-async"}) as client:
        accepted = [client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 8 + i}) for i in range(40)]
    assert {response.status_code for response in accepted} == {202}
    waiting = [start_client(url) for _ in range(5)]
    eventually(lambda: len(processes.tokens()) > 3, "work has begun")
    gateway.send_signal(signal.SIGKILL)
    gateway.wait(10)
    _, url = processes.gateway()
    eventually(lambda: httpx.get(f"{url}/health/ready").status_code == 200, "the other gateway is ready")
    with httpx.Client(base_url=url) as client:
        for i, response in enumerate(accepted):
            eventually(lambda r=response: is_over(client, r), "a job ends")
            job = client.get(response.headers["location"]).json()
            assert job["status"] == "completed"
            assert job["result"]["usage"]["completion_tokens"] == 8 + i
        eventually(lambda: ended(client)["waiting"] == 0, "the queue is empty")
    assert Counter(processes.tokens()).most_common(1)[0][1] <= 8 + 40, "an answer was computed twice"
    for client_process in waiting:
        client_process.wait(10)
    assert worker.poll() is None


def test_a_batch_goes_on_when_its_gateway_was_killed(processes, eventually):
    gateway, url = processes.gateway()
    processes.worker(seats=4, token_s=0.005)
    eventually(lambda: httpx.get(f"{url}/health/ready").status_code == 200, "a worker is there")
    rows = [{"custom_id": f"c{i}", "method": "POST", "body": CHAT | {"max_tokens": 5 + i % 20}} for i in range(150)]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    file = httpx.post(f"{url}/v1/files", files={"file": ("in", content)}, data={"purpose": "batch"}).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions"}
    batch = httpx.post(f"{url}/v1/batches", json=body).json()
    where = f"/v1/batches/{batch['id']}"
    eventually(lambda: httpx.get(url + where).json()["request_counts"]["completed"] > 30, "some lines are answered")
    gateway.send_signal(signal.SIGKILL)
    gateway.wait(10)
    _, url = processes.gateway(port=int(url.rpartition(":")[2]))
    eventually(lambda: httpx.get(url + where).json()["status"] == "completed", "the batch ends", 40)
    batch = httpx.get(url + where).json()
    answers = httpx.get(f"{url}/v1/files/{batch['output_file_id']}/content").text.splitlines()
    assert Counter(json.loads(line)["custom_id"] for line in answers) == Counter(row["custom_id"] for row in rows)
    for answer in map(json.loads, answers):
        asked = 5 + int(answer["custom_id"][1:]) % 20
        assert answer["response"]["body"]["usage"]["completion_tokens"] == asked


def start_client(url: str) -> subprocess.Popen[bytes]:
    code = (
        f"import httpx; httpx.post({url + '/v1/chat/completions'!r}, json={CHAT | {'max_tokens': 400}!r}, timeout=60)"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def is_over(client: httpx.Client, response: httpx.Response) -> bool:
    return client.get(response.headers["location"]).json()["status"] not in ("queued", "running")


def ended(client: httpx.Client) -> dict[str, float]:
    """Numbers of the queue as the gateway's metrics have them."""
    lines = [line.split() for line in client.get("/metrics").text.splitlines() if line.startswith("pingjia_queue_")]
    numbers = {name.removeprefix("pingjia_queue_"): float(value) for name, value in lines}
    return {"waiting": numbers["requests_waiting"], "claimed": numbers["requests_claimed"]}


@pytest.mark.parametrize("stage", ["waiting", "claimed", "streaming"])
def test_a_client_that_goes_costs_nothing_more(processes, eventually, stage):
    _, url = processes.gateway()
    worker = processes.worker(seats=2, token_s=0.6 if stage == "claimed" else 0.02)
    eventually(lambda: httpx.get(f"{url}/health/ready").status_code == 200, "a worker is there")
    with httpx.Client(base_url=url) as client:
        if stage == "waiting":
            worker.send_signal(signal.SIGSTOP)
        body = {**CHAT, "max_tokens": 400, "stream": True}
        with suppress(httpx.ReadTimeout), client.stream("POST", "/v1/chat/completions", json=body, timeout=0.4) as r:
            if stage == "streaming":
                lines = r.iter_lines()
                for _ in range(6):
                    next(lines)
        worker.send_signal(signal.SIGCONT)
        eventually(lambda: sum(ended(client).values()) == 0, "the queue is empty")
        seen = len(processes.tokens())
        eventually(lambda: settled(processes, seen), "no more tokens are made")
        answer = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 3}, timeout=20).json()
        assert answer["usage"]["completion_tokens"] == 3
    assert len(processes.tokens()) < 60


def settled(processes, seen: int) -> bool:
    time.sleep(0.3)
    before = len(processes.tokens())
    time.sleep(0.2)
    return before == len(processes.tokens())


async def test_a_client_of_a_gateway_survives_a_restart_of_redis(processes, eventually):
    """The stream stands still and goes on: no token twice, none missing."""
    _, url = processes.gateway(lease_s=3.0)
    processes.worker(seats=2, token_s=0.02, lease_s=3.0)
    await asyncio.to_thread(eventually, lambda: httpx.get(f"{url}/health/ready").status_code == 200, "ready")
    body = {**CHAT, "max_tokens": 120, "stream": True}
    pieces: list[str] = []
    async with (
        httpx.AsyncClient(base_url=url, timeout=30) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line[6:])["choices"][0]
            pieces.append(choice["delta"].get("content") or "")
            if len(pieces) == 20:
                await asyncio.to_thread(processes.redis.kill)
                await asyncio.sleep(0.5)
                await asyncio.to_thread(processes.redis.start)
    text = "".join(pieces)
    assert len(text) == 120
    assert all((ord(b) - ord(a)) % 26 == 7 for a, b in pairwise(text))


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
async def test_a_clock_that_jumps_in_one_process(jump_s, tmp_path):
    """Forward, every lease is over and every job is claimed again; backward, nothing happens. Each ends once."""
    from pingjia.queue.memory import MemoryQueue
    from pingjia.queue.puller import Puller

    shift = [0.0]
    loop = asyncio.get_running_loop()
    queue = MemoryQueue(Limits(lease_s=0.5), clock=lambda: loop.time() + shift[0])
    backend = ScriptedBackend(0.005, str(tmp_path / "log"))
    pullers = [Puller(queue, backend, name=f"w{i}", seats=4, beat_s=0.1) for i in range(2)]
    running = [asyncio.create_task(puller.run()) for puller in pullers]
    jobs = make_jobs(60, deadline_s=10_000.0)
    await queue.submit(jobs)
    reading = [asyncio.create_task(read(QueueBackend(queue, owner=""), job)) for job in jobs]
    await asyncio.sleep(0.05)
    shift[0] = jump_s
    for job, chunks in zip(jobs, await asyncio.wait_for(asyncio.gather(*reading), 30), strict=True):
        assert_whole(job, chunks)
    assert (await queue.stats()).ended == {"done": 60}
    for puller in pullers:
        await puller.drain(1.0)
    await asyncio.gather(*running)


async def test_readers_that_come_and_go_do_not_disturb_each_other(processes):
    queue = open_stream(processes)
    processes.worker(seats=8)
    jobs = make_jobs(40, tokens=(30, 40))
    await queue.submit(jobs)
    backend, rng = QueueBackend(queue, owner=""), random.Random(1)

    async def peek(job: Job) -> None:
        async with aclosing(backend.stream(job.request)) as chunks:
            for _ in range(rng.randint(1, 5)):
                await anext(chunks)

    peeks = [asyncio.create_task(peek(rng.choice(jobs))) for _ in range(60)]
    whole = await asyncio.wait_for(asyncio.gather(*(read(backend, job) for job in jobs)), 30)
    await asyncio.gather(*peeks)
    for job, chunks in zip(jobs, whole, strict=True):
        assert_whole(job, chunks)
    await queue.close()
