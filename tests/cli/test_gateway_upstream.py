"""`pingjia gateway --upstream`: mistakes are told at once; with a server behind it, it answers and ends on SIGTERM."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("upstream_stub_cli", ROOT / "tests" / "gateway" / "upstream_stub.py")
assert _spec is not None
assert _spec.loader is not None
stubs = importlib.util.module_from_spec(_spec)
sys.modules["upstream_stub_cli"] = stubs
_spec.loader.exec_module(stubs)

COMMAND = [sys.executable, "-c", "from pingjia.cli.main import main; main()", "gateway"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nobody answers"),
        (["smollm2", "--upstream", "http://a/v1"], "contradict"),
        (["--upstream", "ftp://a/v1"], "not an http"),
        (["--upstream", "http://a/v1", "--upstream", "http://a/v1"], "given twice"),
        (["--set", "serve.upstream.servers=[{url: 'http://a/v1', api_key_env: NO_SUCH}]"], "NO_SUCH"),
        (["--set", "serve.upstream.retrys=1"], "unknown key"),
    ],
)
def test_mistakes_are_told_in_one_line(pingjia: Callable[..., Any], words: list[str], said: str) -> None:
    done = pingjia("gateway", *words, "--port", "0")
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_it_answers_and_ends() -> None:
    stub = stubs.Stub()
    environ = {**os.environ, "PINGJIA_UPSTREAM": stub.url}
    process = subprocess.Popen([*COMMAND, "--port", "0"], stderr=subprocess.PIPE, text=True, env=environ)
    try:
        assert process.stderr is not None
        url = next(line.split()[-1] for line in process.stderr if line.startswith("serving at"))
        body = {"messages": [{"role": "user", "content": "hi"}]}
        answer = httpx.post(f"{url}/chat/completions", json=body, timeout=20).json()
        assert answer["choices"][0]["message"]["content"] == "你好, world"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stderr.close()
        stub.stop()
