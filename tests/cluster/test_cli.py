"""Bad input on the command line: exit code 2 and one clear line, before anything is loaded or changed."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from pingjia.cli.main import invoke


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """run("cluster", ...) -> exit code, stdout, stderr."""
    for name in ("CONSUL_HTTP_ADDR", "CONSUL_HTTP_TOKEN", "PINGJIA_CONSUL"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = invoke([str(word) for word in words])
        return (code, *capfd.readouterr())

    return call


@pytest.fixture
def nobody() -> str:
    """The URL of a Consul that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def refused(outcome: tuple[int, str, str], *words: str) -> None:
    code, out, err = outcome
    assert code == 2, outcome
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in out + err
    for word in words:
        assert word in err


def test_consul_that_is_not_there(run, nobody, tmp_path):
    words = (nobody, "start it, or give its address with --consul")
    refused(run("cluster", "status", "--consul", nobody), *words)
    refused(run("cluster", "drain", "a", "--consul", nobody), *words)
    refused(run("cluster", "nginx", "--out", tmp_path / "x.conf", "--consul", nobody), *words)
    refused(run("cluster", "rollout", "--restart", "true", "--consul", nobody), *words)
    refused(run("serve", "/no/model", "--port", "18999", "--consul", nobody), *words)  # before the model is looked for
    assert not (tmp_path / "x.conf").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["serve", "m", "--port", "0", "--consul", "http://h"], "give --port instead of 0"),
        (["serve", "m", "--port", "18999", "--consul", "http://h", "--weight", "0"], "--weight"),
        (["serve", "m", "--port", "18999", "--consul", "http://h", "--name", "a/b"], "neither end a sign"),
        (
            ["serve", "m", "--port", "18999", "--consul", "http://h", "--advertise", "h:x"],
            "write ADDRESS or ADDRESS:PORT",
        ),
        (["cluster", "nginx"], "--out FILE"),
        (["cluster", "nginx", "--out", "/no/such/x.conf"], "/no/such: no such directory"),
        (["cluster", "nginx", "--once", "--set", "keepalvie=3"], "did you mean keepalive?"),
        (["cluster", "nginx", "--once", "--scope", "both"], "scope"),
        (["cluster", "nginx", "--once", "--template", "/no/such.j2"], "/no/such.j2"),
        (["cluster", "rollout"], "say what to roll out"),
        (["cluster", "plan", "--users", "9", "--requests-per-user", "3"], "give --tokens-per-s and --seats"),
    ],
)
def test_what_cannot_be_meant(run, line, words):
    code, _, err = run(*line)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_a_broken_template_is_known_before_consul_is_asked(run, nobody, tmp_path):
    file = tmp_path / "t.j2"
    file.write_text("upstream x {\n{% for m in membres %}{% endfor %}\n}\n")
    refused(run("cluster", "nginx", "--once", "--template", file, "--consul", nobody), "'membres' is undefined")
    file.write_text("a\n{% if %}")
    refused(run("cluster", "nginx", "--once", "--template", file, "--consul", nobody), "broken", "line 2")


def test_a_port_that_is_taken(run, nobody, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = run(
            "cluster", "nginx", "--out", tmp_path / "x.conf", "--listen", f"127.0.0.1:{port}", "--consul", nobody
        )
    refused(outcome, f"port {port} on 127.0.0.1 is in use", "--listen")
    refused(run("cluster", "nginx", "--out", tmp_path / "x", "--listen", "here", "--consul", nobody), "write PORT")


def test_adapters_must_be_where_the_replicas_find_them(run, consul):
    one = ["cluster", "rollout", "--consul", consul.url, "--service", "nobody-here"]
    refused(run(*one, "--adapter", "shop=/x"), "nobody is in the pool 'nobody-here'")
    refused(run("cluster", "status", "--consul", consul.url, "--service", "nobody-here"), "has 0 replicas")


def test_a_plan(run):
    line = ["cluster", "plan", "--users", 2000, "--requests-per-user", 6, "--tokens-per-s", 80, "--seats", 8,
            "--weights-gb", 4, "--kv-gb-per-seat", 0.25, "--price-per-hour", 2.5]  # fmt: skip
    code, out, _ = run(*line, "--json", "--simulate")
    rows = json.loads(out)
    assert code == 0
    assert rows["memory_gb"] == rows["replicas"] * 6
    assert rows["cny_per_month"] == rows["replicas"] * 2.5 * 730
    assert rows["simulated_seats_taken"] == pytest.approx(rows["seats_taken"], abs=0.03)
    assert rows["simulated_p95_wait_s"] < 2.5
    code, out, _ = run(*line)
    assert code == 0
    assert f"replicas{rows['replicas']:>38}" in out
    refused(run(*line, "--answer-tokens", 0), "answer tokens: 0.0 cannot be planned with")
    refused(run(*line, "--balance", "best"), "turns or least")
