"""The few calls of Consul's HTTP API that a pool needs. Knows what an error means, not what to do about it.

Of our own because the Python clients are unmaintained, and because we need six calls. Blocking: used from threads.
"""

from __future__ import annotations

import ssl
from base64 import b64decode
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

from pingjia.cluster.settings import ConsulSettings
from pingjia.errors import PingjiaError, UserError
from pingjia.remote import is_loopback, parse_url, shorten

_WAIT_MORE_S = 5.0  # Consul adds up to a sixteenth to the time that a blocking query waits
_UNKNOWN = ("nknown check", "nknown service", "does not have associated TTL")


class ConsulLost(PingjiaError):
    """Consul cannot be reached or has no leader; asking again later may help."""


class ConsulRefused(UserError):
    """Consul understood and said no: the token may not do this, or a value is not taken."""


class NotRegistered(PingjiaError):
    """Consul knows no such service or check: it was restarted without its data, or somebody removed it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The body of a reading call. `index` is what the next blocking query waits to change."""

    body: Any
    index: int


class Consul:
    """One agent. Close it after use. Every call raises ConsulLost, ConsulRefused or NotRegistered."""

    def __init__(self, settings: ConsulSettings) -> None:
        self.settings = settings
        url = parse_url(settings.url)
        headers = {"X-Consul-Token": settings.token} if settings.token else {}
        self._client = httpx.Client(
            base_url=url,
            headers=headers,
            timeout=settings.timeout_s,
            verify=_tls(settings) if url.scheme == "https" else True,
            trust_env=not is_loopback(url.host),
        )

    def close(self) -> None:
        self._client.close()

    def register(self, definition: dict[str, Any]) -> None:
        """Add or replace a service of this agent, without losing the state of its checks."""
        self._call("PUT", "/v1/agent/service/register", json=definition, params={"replace-existing-checks": "false"})

    def deregister(self, service_id: str) -> None:
        self._call("PUT", f"/v1/agent/service/deregister/{quote(service_id, safe='')}")

    def set_check(self, check_id: str, status: str, output: str) -> None:
        """Say what a TTL check found: passing, warning or critical."""
        body = {"Status": status, "Output": output}
        self._call("PUT", f"/v1/agent/check/update/{quote(check_id, safe='')}", json=body)

    def own(self, service_id: str) -> dict[str, Any] | None:
        """What this agent has registered under an id; None when nothing."""
        try:
            answer = self._call("GET", f"/v1/agent/service/{quote(service_id, safe='')}")
        except NotRegistered:
            return None
        return dict(answer.body)

    def health(self, service: str, *, index: int = 0, wait_s: float = 0.0) -> Answer:
        """All instances of a service with their checks. With `index`, wait until something changes."""
        params: dict[str, Any] = {"index": index, "wait": f"{max(1, round(wait_s))}s"} if index else {}
        timeout_s = self.settings.timeout_s + (wait_s + wait_s / 16 + _WAIT_MORE_S if index else 0.0)
        return self._call("GET", f"/v1/health/service/{quote(service, safe='')}", params=params, timeout=timeout_s)

    def read(self, key: str) -> bytes | None:
        """The value of a key; None when there is none."""
        try:
            # Any server may answer: what it says is a moment old at most, and the leader is spared every heartbeat.
            entry = self._call("GET", f"/v1/kv/{quote(key)}", params={"stale": ""}).body[0]
        except NotRegistered:
            return None
        return b64decode(entry["Value"] or "")

    def write(self, key: str, value: bytes) -> None:
        self._call("PUT", f"/v1/kv/{quote(key)}", content=value)

    def delete(self, key: str) -> None:
        self._call("DELETE", f"/v1/kv/{quote(key)}")

    def leader(self) -> str:
        """The address of the leading server; empty while there is none."""
        return str(self._call("GET", "/v1/status/leader").body)

    def _call(self, method: str, path: str, **options: Any) -> Answer:
        try:
            response = self._client.request(method, path, **options)
        except httpx.TransportError as e:
            raise ConsulLost(f"Consul at {self.settings.url}: {shorten(str(e)) or type(e).__name__}") from None
        if response.is_success:
            return Answer(_body(response), _index(response))
        raise self._error(response, path)

    def _error(self, response: httpx.Response, path: str) -> Exception:
        words = shorten(response.text) or response.reason_phrase
        said = f"Consul at {self.settings.url} answered {response.status_code} to {path}: {words}"
        if response.status_code == 404 or any(w in words for w in _UNKNOWN):
            return NotRegistered(said)
        if response.status_code in (401, 403) or "ermission denied" in words or "ACL not found" in words:
            return ConsulRefused(f"{said}; give a token that may: CONSUL_HTTP_TOKEN or CONSUL_HTTP_TOKEN_FILE")
        if response.status_code == 400:
            return ConsulRefused(said)
        return ConsulLost(said)


def check_consul(settings: ConsulSettings) -> None:
    """Return if Consul answers and has a leader. Raises UserError saying what is wrong."""
    try:
        consul = Consul(settings)
        try:
            leader = consul.leader()
        finally:
            consul.close()
    except (ConsulLost, NotRegistered) as e:
        raise UserError(f"{e}; start it, or give its address with --consul http://HOST:8500") from None
    if not leader:
        raise UserError(f"Consul at {settings.url} has no leader; `consul operator raft list-peers` says why")


def _body(response: httpx.Response) -> Any:
    if "json" not in response.headers.get("content-type", ""):
        return response.text
    try:
        return response.json()
    except ValueError:
        raise ConsulLost(f"{response.url} answered no JSON: is this Consul?") from None


def _index(response: httpx.Response) -> int:
    value = response.headers.get("x-consul-index", "0")
    return int(value) if value.isdigit() else 0


def _tls(settings: ConsulSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
        if settings.cert_file:
            context.load_cert_chain(settings.cert_file, settings.key_file)
    except (OSError, ssl.SSLError) as e:
        files = ", ".join(f for f in (settings.ca_file, settings.cert_file, settings.key_file) if f)
        raise UserError(f"TLS to Consul: {e} ({files})") from None
    if not settings.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
