"""deploy/nginx-tls.conf in a real nginx, with a certificate of its own, before a real server."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import warnings
from pathlib import Path

import httpx
import pytest

from pingjia.gateway.settings import GatewaySettings

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "nginx-tls.conf"
MAIN = """
{user} daemon off; pid {folder}/pid; error_log {folder}/error.log warn;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    include {folder}/pingjia.conf;
}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def certificate(folder: Path) -> None:
    """Signed by itself, for the name in the file."""
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=ai.example.com"]
    words += [
        "-addext",
        "subjectAltName=DNS:ai.example.com",
        "-keyout",
        str(folder / "key"),
        "-out",
        str(folder / "pem"),
    ]
    subprocess.run(words, check=True, capture_output=True)


def placed(folder: Path, gateway_port: int, http_port: int, tls_port: int) -> str:
    """The file as it is shipped, but for what belongs to a machine: ports and the place of the certificate."""
    text = CONFIG.read_text()
    changes = {
        "server 127.0.0.1:8000;": f"server 127.0.0.1:{gateway_port};",
        "listen 80;": f"listen 127.0.0.1:{http_port};",
        "listen 443 ssl http2;": f"listen 127.0.0.1:{tls_port} ssl http2;",
        "/etc/nginx/tls/ai.example.com.pem": f"{folder}/pem",
        "/etc/nginx/tls/ai.example.com.key": f"{folder}/key",
    }
    for shipped, here in changes.items():
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, here)
    return text


class Site:
    def __init__(self, gateway, folder: Path) -> None:
        self.gateway, self.http_port, self.tls_port = gateway, free_port(), free_port()
        certificate(folder)
        (folder / "pingjia.conf").write_text(placed(folder, gateway.port, self.http_port, self.tls_port))
        (folder / "nginx.conf").write_text(MAIN.format(folder=folder, user="user root;" if os.geteuid() == 0 else ""))
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        self.process = subprocess.Popen([nginx, "-c", str(folder / "nginx.conf"), "-p", str(folder)])
        context = ssl.create_default_context(cafile=str(folder / "pem"))
        context.check_hostname = False  # the name leads to another place here
        self.client = httpx.Client(base_url=f"https://127.0.0.1:{self.tls_port}", verify=context, timeout=20)
        end = time.monotonic() + 20
        while True:
            try:
                self.client.get("/health/live")
                return
            except httpx.TransportError:
                assert time.monotonic() < end, (folder / "error.log").read_text()
                time.sleep(0.05)

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if not (shutil.which("nginx") or Path("/usr/sbin/nginx").exists()):
        pytest.skip("NOT TESTED: there is no nginx here; see tests/debian-packages.txt")
    gateway_tests = sys.modules["conftest_of_gateway"]
    with gateway_tests.running(GatewaySettings(port=0, access_log=False, ping_s=0.1)) as gateway:
        site = Site(gateway, tmp_path_factory.mktemp("nginx"))
        yield site
        site.stop()


CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}


def test_an_answer_through_tls(site):
    answer = site.client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine"})
    assert answer.json()["choices"][0]["message"]["content"] == "你好, world"
    assert answer.headers["x-request-id"] == "mine"
    assert "max-age" in answer.headers["strict-transport-security"]


def test_without_tls_one_is_sent_to_it(site):
    answer = httpx.get(f"http://127.0.0.1:{site.http_port}/v1/models", headers={"host": "ai.example.com"})
    assert (answer.status_code, answer.headers["location"]) == (301, "https://ai.example.com/v1/models")


def test_old_protocols_are_refused(site):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with warnings.catch_warnings(action="ignore"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", site.tls_port), timeout=10) as sock,
        pytest.raises((ssl.SSLError, OSError)),
    ):
        context.wrap_socket(sock)


def test_a_stream_is_not_held_back(site, monkeypatch):
    """The first piece is here while the backend still holds the last ones."""
    script = site.gateway.backend.script
    monkeypatch.setattr(script, "freeze_after", 3)
    body = {**CHAT, "stream": True, "temperature": 1}
    with site.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        seen = [next(lines) for _ in range(12)]
    assert any("你" in line for line in seen)
    assert any(line == ": ping" for line in seen), "and signs of life pass too"


def test_a_client_that_leaves_is_seen(site, monkeypatch):
    backend = site.gateway.backend
    monkeypatch.setattr(backend.script, "freeze_after", 1)
    before = len(backend.cancelled)
    with site.client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True, "temperature": 1}) as answer:
        next(answer.iter_lines())
    site.client.close()
    site.client = httpx.Client(base_url=site.client.base_url, verify=site.client._transport._pool._ssl_context)
    end = time.monotonic() + 10
    while len(backend.cancelled) == before:
        assert time.monotonic() < end, "its answer is still computed"
        time.sleep(0.02)


def test_the_log_has_the_clients_own_address_and_none_it_claims(site, caplog):
    with caplog.at_level("INFO", logger="pingjia.access"):
        site.client.get("/v1/models", headers={"x-forwarded-for": "203.0.113.77"})
        time.sleep(0.2)
    lines = [record.getMessage() for record in caplog.records if "/v1/models" in record.getMessage()]
    assert lines
    assert all('"client": "127.0.0.1"' in line for line in lines)


def test_numbers_stay_inside_and_large_bodies_outside(site):
    assert site.client.get("/metrics").status_code == 404
    answer = site.client.post(
        "/v1/chat/completions", content=b"x" * 3_000_000, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large", "the gateway's own words"


def test_times_are_longer_than_the_gateways():
    text, settings = CONFIG.read_text(), GatewaySettings()
    assert int(re.search(r"proxy_read_timeout (\d+)s", text)[1]) > settings.deadline_s > settings.ping_s
    assert int(re.search(r"client_max_body_size (\d+)m", text)[1]) * 1e6 >= settings.max_file_bytes
