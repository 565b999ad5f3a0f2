"""A marker in prompts, answers, keys and files is in no line of the log, whatever goes wrong."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest
from gateway_fakes import FakeBackend, Script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pingjia.errors import EngineError
from pingjia.gateway import hash_key
from pingjia.logs import FORMAT, QuietFormatter
from pingjia.types import Request

MARKER = "MARKER7f3a"


@pytest.fixture
def log():
    """Everything that is logged from INFO on, as a server writes it."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(QuietFormatter(FORMAT))
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield text
    root.removeHandler(handler)
    root.setLevel(before)


def said(request: Request) -> str:
    return "".join(chr(i - 3) for i in request.prompt_ids if i >= 3)


class Quoting(FakeBackend):
    """Fails with what it was asked in the message, as libraries do."""

    kind: type[Exception] = ValueError
    after = 0

    async def stream(self, request):
        num = 0
        async for chunk in super().stream(request):
            if num == self.after:
                try:
                    raise KeyError(said(request))
                except KeyError as e:
                    raise self.kind(f"cannot read {said(request)!r}") from e
            num += 1
            yield chunk


ERRORS = [
    {"temperature": -1, "user": MARKER},
    {"messages": [{"role": MARKER, "content": MARKER}]},
    {"messages": MARKER},
    {"model": MARKER},
    {"stop": [MARKER] * 40},
    {"tools": MARKER, MARKER: MARKER},
    {"max_tokens": 10**9},
    {"response_format": {"type": "json_schema", "json_schema": {"name": MARKER, "schema": {"type": MARKER}}}},
    {"logit_bias": {MARKER: 1}},
]


@pytest.mark.parametrize("road", [0.0, 1e9], ids=["queue", "direct"])
@pytest.mark.parametrize("kind", [ValueError, UnicodeError, EngineError, RecursionError])
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_backend_that_quotes_what_it_was_asked(start, log, road, kind, after, stream):
    backend = Quoting(script=Script(text=MARKER * 3))
    backend.kind, backend.after = kind, after
    gateway = start(backend=backend, queue_above_rps=road)
    if kind is EngineError:
        backend.kind = lambda text: EngineError("the engine stopped")
    gateway.chat(MARKER, stream=stream)
    gateway.http.post("/", json={"prompt": MARKER, "history": [[MARKER, MARKER]]})
    gateway.http.post("/v1/completions", json={"model": "base", "prompt": MARKER, "stream": stream})
    gateway.stop()
    gateway.stop = lambda: None
    assert MARKER not in log.getvalue()
    assert "Traceback" in log.getvalue() or kind is EngineError, "what went wrong is told all the same"


def test_what_is_refused(start, log):
    gateway = start(api_keys=[hash_key("sk-right")])
    right = {"authorization": "Bearer sk-right"}
    body = {"model": "base", "messages": [{"role": "user", "content": MARKER}]}
    for wrong in ERRORS:
        gateway.http.post("/v1/chat/completions", json={**body, **wrong}, headers=right)
        gateway.http.post("/v1/chat/completions", json={**body, **wrong}, headers={**right, "prefer": "respond-async"})
    for key in (MARKER, f"sk-{MARKER}", "x"):
        gateway.http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
    gateway.http.get("/v1/models", params={"key": MARKER}, headers={**right, "cookie": MARKER, "user-agent": MARKER})
    for raw in (f"{{{MARKER}", f'"{MARKER}"', MARKER, f'{{"messages": "{MARKER}"', "\x00" + MARKER):
        gateway.http.post("/v1/chat/completions", content=raw, headers={**right, "content-type": "application/json"})
        gateway.http.post("/v1/chat/completions", content=raw, headers={**right, "content-type": MARKER})
        gateway.http.post("/v1/files", content=raw, headers={**right, "content-type": "multipart/form-data"})
    gateway.http.post("/v1/files", files={"file": (MARKER, MARKER)}, data={"purpose": MARKER}, headers=right)
    assert MARKER not in log.getvalue()
    assert log.getvalue().count("/v1/chat/completions") > 20, "the requests are in the log all the same"


def test_batches_and_jobs(start, log, eventually):
    backend = Quoting(script=Script(text=MARKER))
    gateway = start(backend=backend)
    rows = [{"custom_id": f"c{i}", "body": {"messages": [{"role": "user", "content": MARKER}]}} for i in range(3)]
    content = "\n".join([*map(json.dumps, rows), f"{{{MARKER}"])
    file = gateway.http.post("/v1/files", files={"file": ("in", content)}, data={"purpose": "batch"}).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "metadata": {"m": MARKER}}
    batch = gateway.http.post("/v1/batches", json=asked).json()
    where = f"/v1/batches/{batch['id']}"
    eventually(lambda: gateway.http.get(where).json()["status"] in ("completed", "failed"), "the batch ends")
    body = {"model": "base", "messages": [{"role": "user", "content": MARKER}]}
    headers = {"prefer": "respond-async", "idempotency-key": MARKER}
    job = gateway.http.post("/v1/chat/completions", json=body, headers=headers).headers["location"]
    eventually(lambda: gateway.http.get(job).json()["status"] == "failed", "the job ends")
    assert MARKER not in log.getvalue()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    wrong=st.dictionaries(
        st.sampled_from(["model", "messages", "stop", "seed", "n", "logit_bias", "response_format", "tools", "user"]),
        st.recursive(
            st.sampled_from([MARKER, None, -1, 1e300, True]),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", MARKER]), inner, max_size=2)
            ),
            max_leaves=5,
        ),
        min_size=1,
    )
)
def test_whatever_is_wrong(gateway, log, wrong):
    body = {"model": "base", "messages": [{"role": "user", "content": MARKER}], "max_tokens": 2, **wrong}
    gateway.http.post("/v1/chat/completions", json=json.loads(json.dumps(body).replace("1e+300", "1e300")))
    assert MARKER not in log.getvalue()


def test_the_formatter_would_be_missed():
    """Without it the marker is in the log: the tests above can fail."""
    try:
        raise ValueError(MARKER)
    except ValueError:
        caught = sys.exc_info()
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "request %s failed", ("r",), caught)
    assert MARKER in logging.Formatter(FORMAT).format(record)
    quiet = QuietFormatter(FORMAT).format(logging.makeLogRecord({**record.__dict__, "exc_text": None}))
    assert MARKER not in quiet
    assert "ValueError (--debug shows its message)" in quiet
    assert "test_the_formatter_would_be_missed" in quiet
