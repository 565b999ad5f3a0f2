"""What a gateway adds to a request and how many it passes on: ours on its roads, and the litellm proxy, in one run.

Usage: python benchmarks/gateway.py [--out FILE] [--rounds 300] [--load-s 6] [--without NAME ...] [--venv DIR]
One stub of an OpenAI-compatible server answers at once: 16 tokens whole, or as 16 events. Before it stand, each in a
process of its own and as they ship: `pingjia gateway --upstream` and the litellm proxy (in an environment of its own,
which is made on the first run and takes a minute or two). Beside them: our gateway over a scripted engine in its own
process, straight (`engine`) and through the queue (`queue`), and over Redis with a worker in another process (`redis`,
if redis-server is there). Rounds ask every one of them in turn over one kept connection, whole and streamed, each time
another question. `added` is against the stub itself, also for `engine`, `queue` and `redis`, though their engine costs
less than the stub does: so they look a little better than they are. Then 32 clients at once ask one target after the
other; clients, gateway and stub share the machine's cores. No answer is kept: temperature 0.7 without a seed.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LITELLM = "litellm[proxy]==1.90.7"  # the newest whose parts are all to be had here
NUM_TOKENS, NUM_CLIENTS = 16, 32
WORDS = [f" word{i}" for i in range(NUM_TOKENS)]
NAMES = ("upstream", "litellm", "engine", "queue", "redis")

# ---- the stub: OpenAI's API with as little work as Python can do


def stub_answers() -> tuple[bytes, bytes, bytes]:
    """(whole answer, streamed answer, list of models) as they go over the wire."""
    head = {"id": "chatcmpl-1", "created": 1_700_000_000, "model": "base"}
    usage = {"prompt_tokens": 9, "completion_tokens": NUM_TOKENS, "total_tokens": 9 + NUM_TOKENS}
    message = {"role": "assistant", "content": "".join(WORDS)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    whole = json.dumps({**head, "object": "chat.completion", "choices": [choice], "usage": usage}).encode()
    events = [
        {"delta": {"role": "assistant", "content": ""}},
        *({"delta": {"content": w}} for w in WORDS),
        {"delta": {}},
    ]
    rows = [{"index": 0, "finish_reason": None, **event} for event in events]
    rows[-1]["finish_reason"] = "stop"
    chunks = [{**head, "object": "chat.completion.chunk", "choices": [row]} for row in rows]
    chunks.append({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(e), e) for e in (p.encode() + b"\n\n" for p in stream.split("\n\n")[:-1]))
    models = json.dumps({"object": "list", "data": [{"id": "base", "object": "model", "created": 1, "owned_by": "x"}]})
    ok = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
    streamed = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + pieces
        + b"0\r\n\r\n"
    )
    return ok % (len(whole), whole), streamed, ok % (len(models), models.encode())


class Stub(asyncio.Protocol):
    """Reads just enough of a request to know where it ends and whether it wants a stream."""

    whole, streamed, models = stub_answers()

    def connection_made(self, transport: Any) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            _, _, length = head.partition(b"content-length:")
            total = end + 4 + (int(length.split(b"\r\n")[0]) if length else 0)
            if len(self.buffer) < total:
                return
            body, self.buffer = self.buffer[end + 4 : total], self.buffer[total:]
            wants_stream = b'"stream":true' in body.replace(b" ", b"")
            is_get = head.startswith(b"get")
            self.transport.write(self.models if is_get else self.streamed if wants_stream else self.whole)


async def serve_stub(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", port)
    await server.serve_forever()


# ---- our gateway over an engine that costs nothing


class Scripted:
    """A backend that says the same words at once."""

    def __init__(self, tokenizer: Any) -> None:
        from pingjia.types import Chunk, ModelCard, Usage

        ids = [tuple(tokenizer.encode(word)) for word in WORDS]
        self.cards = [ModelCard("base", "base", None, 8192, 1, "b" * 64)]
        self.chunks = [Chunk(word, word_ids[:1]) for word, word_ids in zip(WORDS, ids, strict=True)]
        self.chunks.append(Chunk(finish_reason="stop", usage=Usage(9, NUM_TOKENS)))

    def models(self) -> list[Any]:
        return self.cards

    def is_ready(self) -> bool:
        return True

    def stats(self) -> Any:
        from pingjia.types import EngineStats

        return EngineStats()

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        for chunk in self.chunks:
            yield chunk


def serve_ours(role: str, port: int, redis_url: str | None) -> None:
    """`engine` and `queue`: all in this process; `redis`: a gateway whose worker is `worker`."""
    from pingjia import gateway
    from pingjia.chat import load_tokenizer

    tokenizer = load_tokenizer("smollm2")
    if role == "worker":
        from pingjia.queue.opening import open_queue
        from pingjia.worker.pulling import pull

        pull(Scripted(tokenizer), lambda: open_queue(redis_url), seats=64, lease_s=10.0, drain_s=1.0)
        return
    rps = 1e9 if role == "engine" else 0.0
    settings = gateway.GatewaySettings(port=port, redis_url=redis_url, queue_above_rps=rps, max_concurrent=256)
    backend = None if role == "redis" else Scripted(tokenizer)
    app = gateway.create_app(backend, tokenizer, settings, seats=64)
    gateway.serve(app, settings)


# ---- starting them


class Fleet(contextlib.ExitStack):
    """Processes that end with the run. Each target is a port; a path of `/v1/chat/completions` is asked there."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, name: str, command: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        log = self.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **(env or {})}, cwd=self.folder)
        self.callback(self._end, process)
        return process

    def me(self, *arguments: str) -> list[str]:
        return [sys.executable, str(Path(__file__).resolve()), *arguments]

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()

    def until_answers(self, name: str, port: int, timeout_s: float = 90.0) -> int:
        """Returns the port once a chat is answered there."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            with contextlib.suppress(OSError, AssertionError, http.client.HTTPException):
                ask(http.client.HTTPConnection("127.0.0.1", port, timeout=10), 0, stream=False)
                return port
            time.sleep(0.2)
        raise SystemExit(f"{name} did not answer; its log:\n{(self.folder / f'{name}.log').read_text()[-3000:]}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def litellm_environment(folder: Path) -> Path:
    """The proxy's own environment, made once. It must not share ours: it pins what we pin otherwise."""
    program = folder / "bin" / "litellm"
    if not program.exists():
        print(f"installing {LITELLM} into {folder} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PIP_CONSTRAINT")}
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", LITELLM], check=True, env=clean)
    return program


def start_litellm(fleet: Fleet, stub: int, venv: Path) -> int:
    port = free_port()
    config = fleet.folder / "litellm.yaml"
    model = {"model": "openai/base", "api_base": f"http://127.0.0.1:{stub}/v1", "api_key": "none"}
    config.write_text(json.dumps({"model_list": [{"model_name": "base", "litellm_params": model}]}))
    command = [str(litellm_environment(venv)), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    fleet.run("litellm", command, {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "DISABLE_ADMIN_UI": "True"})
    return fleet.until_answers("litellm", port)


def start_upstream(fleet: Fleet, stub: int) -> int:
    port = free_port()
    options = ["gateway", "--upstream", f"http://127.0.0.1:{stub}/v1", "--port", str(port)]
    options += ["--set", "serve.max_concurrent=256", "--set", "serve.queue_above_rps=1e9"]
    fleet.run("upstream", [sys.executable, "-c", "from pingjia.cli.main import main; main()", *options])
    return fleet.until_answers("upstream", port)


def start_ours(fleet: Fleet, role: str) -> int:
    port = free_port()
    fleet.run(role, fleet.me("--role", role, "--port", str(port)))
    return fleet.until_answers(role, port)


def start_redis(fleet: Fleet) -> int:
    redis, port = free_port(), free_port()
    url = f"redis://127.0.0.1:{redis}/0"
    options = ["--port", str(redis), "--bind", "127.0.0.1", "--appendonly", "yes", "--dir", str(fleet.folder)]
    fleet.run("redis-server", ["redis-server", *options])
    time.sleep(1.0)
    fleet.run("worker", fleet.me("--role", "worker", "--redis", url))
    fleet.run("redis", fleet.me("--role", "redis", "--port", str(port), "--redis", url))
    return fleet.until_answers("redis", port)


def start_all(fleet: Fleet, options: argparse.Namespace) -> dict[str, int]:
    """Name -> port, `stub` first. What cannot be had here is left out, and said."""
    stub = free_port()
    fleet.run("stub", fleet.me("--role", "stub", "--port", str(stub)))
    ports = {"stub": fleet.until_answers("stub", stub)}
    for name in NAMES:
        if name in options.without:
            continue
        if name == "redis" and shutil.which("redis-server") is None:
            print("NOT MEASURED: redis, because there is no redis-server", file=sys.stderr)
        elif name == "litellm":
            ports[name] = start_litellm(fleet, stub, options.venv)
        elif name == "upstream":
            ports[name] = start_upstream(fleet, stub)
        else:
            ports[name] = start_redis(fleet) if name == "redis" else start_ours(fleet, name)
    return ports


# ---- asking


def question(number: int, *, stream: bool) -> bytes:
    text = f"Question {number}: what about article {number * 37 % 1009}?"
    body = {"model": "base", "messages": [{"role": "user", "content": text}], "max_tokens": 64, "temperature": 0.7}
    return json.dumps({**body, **({"stream": True} if stream else {})}).encode()


_HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer none"}


def ask(connection: http.client.HTTPConnection, number: int, *, stream: bool) -> tuple[float, float]:
    """(seconds to the first byte of the body, to its end)."""
    body = question(number, stream=stream)
    started = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, _HEADERS)
    response = connection.getresponse()
    first = response.read(1)
    first_s = time.perf_counter() - started
    text = first + response.read()
    whole_s = time.perf_counter() - started
    assert response.status == 200, text
    assert b"word15" in text, text
    return first_s, whole_s


def alone(ports: dict[str, int], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each request, one at a time, in turn."""
    connections = {name: http.client.HTTPConnection("127.0.0.1", port, timeout=30) for name, port in ports.items()}
    took: dict[str, dict[str, list[float]]] = {n: {"whole": [], "first": [], "stream": []} for n in ports}
    for i in range(-20, rounds):  # the first ones warm up
        for name, connection in connections.items():
            if connection.sock is not None:
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _, whole_s = ask(connection, i, stream=False)
            first_s, stream_s = ask(connection, i, stream=True)
            if i >= 0:
                for kind, seconds in (("whole", whole_s), ("first", first_s), ("stream", stream_s)):
                    took[name][kind].append(seconds * 1000)
    return took


async def _client(port: int, number: int, end: float, *, stream: bool) -> int:
    """One of many: asks as long as there is time; returns how many were answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    done, mark = 0, b"0\r\n\r\n" if stream else b""
    while time.perf_counter() < end:
        number += NUM_CLIENTS
        body = question(number, stream=stream)
        head = "".join(f"{k}: {v}\r\n" for k, v in {**_HEADERS, "Content-Length": len(body)}.items())
        writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in answer:
            break
        length = answer.partition(b"content-length:")[2].split(b"\r\n")[0]
        await (reader.readexactly(int(length)) if length else reader.readuntil(mark or b"0\r\n\r\n"))
        done += 1
    writer.close()
    return done


async def crowd(port: int, seconds: float, *, stream: bool) -> float:
    """Requests a second of many clients at once."""
    started = time.perf_counter()
    clients = [_client(port, i, started + seconds, stream=stream) for i in range(NUM_CLIENTS)]
    return sum(await asyncio.gather(*clients)) / (time.perf_counter() - started)


# ---- the report


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def figures(took: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Median and 95th percentile in milliseconds, and what was added to those of the stub."""
    out: dict[str, Any] = {}
    for name, kinds in took.items():
        row = {}
        for kind, values in kinds.items():
            row[f"{kind}_median_ms"] = round(statistics.median(values), 3)
            row[f"{kind}_p95_ms"] = round(percentile(values, 0.95), 3)
        out[name] = row
    for name in took:
        added = {key: round(out[name][key] - out["stub"][key], 3) for key in out["stub"] if name != "stub"}
        out[name] = {**out[name], **{f"added_{key}": value for key, value in added.items()}}
    return out


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, Fleet(Path(folder)) as fleet:
        ports = start_all(fleet, options)
        results = figures(alone(ports, options.rounds))
        for name, port in ports.items():
            for kind in ("whole", "stream"):
                rate = asyncio.run(crowd(port, options.load_s, stream=kind == "stream"))
                results[name][f"{kind}_per_s"] = round(rate, 1)
            print(name, json.dumps(results[name]), file=sys.stderr)
    return results


def about() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "litellm": LITELLM.partition("==")[2],
        "uvicorn": version("uvicorn"),
        "clients": NUM_CLIENTS,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--load-s", type=float, default=6.0)
    parser.add_argument("--without", nargs="*", default=[], choices=NAMES)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "pingjia-litellm-proxy")
    parser.add_argument("--role", choices=("stub", "engine", "queue", "redis", "worker"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--redis", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "stub":
        asyncio.run(serve_stub(options.port))
    elif options.role:
        serve_ours(options.role, options.port, options.redis)
    else:
        text = json.dumps({"targets": measure(options), "rounds": options.rounds, **about()})
        if options.out:
            options.out.write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main()
