"""Spans of requests: which there are, whose children, over HTTP and through Redis, without a word of what was said."""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from gateway_fakes import FakeBackend, Script

from pingjia.queue.opening import open_queue
from pingjia.queue.puller import Puller
from pingjia.trace import NO_TRACER, Tracer, open_tracer

sdk = pytest.importorskip("opentelemetry.sdk.trace")
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "MARKER-of-what-was-said"


class Told:
    """What was told so far."""

    def __init__(self) -> None:
        self.memory = InMemorySpanExporter()
        provider = sdk.TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.memory))
        self.tracer = Tracer(provider)

    def spans(self):
        return {span.name: span for span in self.memory.get_finished_spans()}

    def parents(self) -> dict[str, str]:
        """Name -> name of its parent, "" for none that we told."""
        names = {span.context.span_id: span.name for span in self.memory.get_finished_spans()}
        return {
            span.name: names.get(span.parent.span_id, "") if span.parent else ""
            for span in self.memory.get_finished_spans()
        }


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def traced(told, start, monkeypatch):
    """start(**settings) -> a server that tells its spans into memory."""
    monkeypatch.setattr("pingjia.gateway.app.open_tracer", lambda *_: told.tracer)
    return start


ASK = "POST /v1/chat/completions"


def test_a_request_that_goes_straight(traced, told, eventually):
    gateway = traced()
    answer = gateway.http.post(
        "/v1/chat/completions",
        json={"model": "base", "messages": [{"role": "user", "content": SECRET}]},
        headers={"traceparent": PARENT, "tracestate": "vendor=7"},
    )
    assert answer.status_code == 200
    eventually(lambda: ASK in told.spans(), "the whole is told")
    assert told.parents() == {
        "gate": ASK, "prefill": "direct", "decode": "direct", "direct": ASK, "reply": ASK, ASK: "",
    }  # fmt: skip
    whole = told.spans()[ASK]
    assert f"{whole.context.trace_id:032x}" == PARENT[3:35]
    assert f"{whole.parent.span_id:016x}" == PARENT[36:52]
    assert whole.attributes["http.response.status_code"] == 200
    assert whole.attributes["gen_ai.usage.output_tokens"] > 0
    assert told.spans()["decode"].context.trace_state.get("vendor") == "7"
    assert answer.headers["traceparent"][3:35] == PARENT[3:35]
    assert told.spans()["prefill"].end_time <= told.spans()["decode"].start_time


def test_through_the_queue(traced, told, eventually):
    gateway = traced(queue_above_rps=0)
    gateway.chat(SECRET, stream=True)
    eventually(lambda: {ASK, "wait"} <= told.spans().keys(), "the whole is told")
    parents = told.parents()
    assert {parents[name] for name in ("wait", "prefill", "decode")} == {"queue"}
    assert told.spans()["wait"].start_time <= told.spans()["wait"].end_time
    assert told.spans()["wait"].attributes["pingjia.delivery"] == 1


async def test_through_redis_into_another_process(told, redis, monkeypatch):
    """The worker's spans are children of the gateway's, though nothing but the queue joins them."""
    import asyncio

    from pingjia.queue.job import Job
    from pingjia.types import Request, Sampling

    asking, working = open_queue(redis.url), open_queue(redis.url)
    worker = Told()
    puller = Puller(working, FakeBackend(), name="w", seats=2, beat_s=0.2, tracer=worker.tracer)
    running = asyncio.create_task(puller.run())
    with told.tracer.span("queue") as span:
        await asking.submit([Job(Request("r1", (1, 2), Sampling(), trace=span.carrier))])
        async for part in asking.follow("r1"):
            if part.end is not None:
                break
    await puller.drain(1.0)
    await running
    await asking.close()
    spans = worker.spans()
    assert spans.keys() == {"wait", "prefill", "decode"}
    parent = told.spans()["queue"].context
    assert {(s.context.trace_id, s.parent.span_id) for s in spans.values()} == {(parent.trace_id, parent.span_id)}


@pytest.mark.parametrize("stream", [False, True])
def test_failures_are_told_without_words(traced, told, eventually, stream):
    script = Script(raise_after=2, error=RuntimeError(SECRET))
    gateway = traced(backend=FakeBackend(script))
    gateway.chat(SECRET, stream=stream, temperature=1)
    gateway.http.post("/v1/chat/completions", json={"model": SECRET, "messages": [{"role": "user", "content": "x"}]})
    eventually(lambda: len([s for s in told.memory.get_finished_spans() if s.name == ASK]) == 2, "both are told")
    assert told.spans()["decode"].attributes["error.type"] == "RuntimeError"
    assert not told.spans()["decode"].status.is_ok
    for span in told.memory.get_finished_spans():
        assert SECRET not in span.to_json()


def test_what_is_said_is_in_no_span(traced, told, eventually):
    gateway = traced(backend=FakeBackend(Script(text=SECRET)), api_keys_env="X")
    gateway.http.get("/v1/models", params={"q": SECRET}, headers={"authorization": f"Bearer {SECRET}"})
    gateway.http.get(f"/v1/models/{SECRET}")
    gateway.chat(SECRET, user=SECRET)
    eventually(lambda: ASK in told.spans(), "told")
    for span in told.memory.get_finished_spans():
        assert SECRET not in span.to_json()


def test_probes_have_none_and_nothing_is_open_at_the_end(traced, told, eventually):
    gateway = traced()
    for path in ("/health", "/health/live", "/metrics"):
        gateway.http.get(path)
    assert told.spans() == {}


@pytest.mark.parametrize("parent", ["", "garbage", "00-0-0-00", PARENT[:-2] + "zz", "0" * 500])
def test_what_is_no_traceparent_begins_a_trace(traced, told, eventually, parent):
    gateway = traced()
    assert gateway.http.get("/v1/models", headers={"traceparent": parent}).status_code == 200
    eventually(lambda: "GET /v1/models" in told.spans(), "told")
    assert told.spans()["GET /v1/models"].parent is None


class Collector(HTTPServer):
    """Takes what an OTLP exporter sends."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, bytes]] = []
        super().__init__(("127.0.0.1", 0), Taking)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Taking(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip

            content = gzip.decompress(content)
        self.server.bodies.append((self.path, content))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector():
    server = Collector()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("how", ["setting", "variable"])
def test_a_real_collector_gets_them_by_otlp(start, collector, eventually, monkeypatch, how):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    settings = {"traces_url": collector.url} if how == "setting" else {}
    if how == "variable":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "my-gateway")
    gateway = start(**settings)
    gateway.chat("hi")
    gateway.app.state.service.tracer._provider.force_flush()
    eventually(lambda: bool(collector.bodies), "something came")
    path, body = collector.bodies[0]
    assert path == "/v1/traces"
    (sent,) = ExportTraceServiceRequest.FromString(body).resource_spans
    service = {a.key: a.value.string_value for a in sent.resource.attributes}["service.name"]
    assert service == ("pingjia-gateway" if how == "setting" else "my-gateway")
    assert {span.name for scope in sent.scope_spans for span in scope.spans} >= {"gate", "direct", "prefill", "decode"}


def test_a_collector_that_is_away_costs_no_answer(start):
    gateway = start(traces_url="http://127.0.0.1:9")
    assert gateway.chat("hi").status_code == 200


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_SERVICE_NAME": "x"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_off_unless_asked_for(environ):
    assert open_tracer("s", None, environ) is NO_TRACER
    assert open_tracer("s", None, environ).span("x").carrier == ""


def test_without_traces_the_library_is_not_loaded():
    code = (
        "import sys; from pingjia.trace import open_tracer; t = open_tracer('x', None, {}); "
        "t.span('a').child('b').end(); print([m for m in sys.modules if m.startswith('opentelemetry.sdk')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
