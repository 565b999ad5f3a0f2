"""API keys: who may call. Keys are kept and compared as sha256; logs and the ledger see a short piece of the hash."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from pingjia.errors import UserError
from pingjia.gateway.errors import Unauthorized, respond
from pingjia.gateway.settings import GatewaySettings

_ID_DIGITS = 12


def hash_key(key: str) -> str:
    """sha256 of a key in hex, as `api_keys` wants it."""
    return hashlib.sha256(key.encode()).hexdigest()


class KeyRing:
    """The known keys. An empty ring lets everybody in."""

    def __init__(self, hashes: Iterable[str] = ()) -> None:
        self._hashes = tuple(dict.fromkeys(hashes))

    def __len__(self) -> int:
        return len(self._hashes)

    def identify(self, key: bytes) -> str | None:
        """The id of the key, or None. Takes the same time whichever key it is."""
        digest = hashlib.sha256(key).hexdigest()
        # Every hash is compared, without stopping at the first that fits.
        known = [hmac.compare_digest(digest, h) for h in self._hashes]
        return digest[:_ID_DIGITS] if any(known) else None


def load_keys(settings: GatewaySettings, environ: Mapping[str, str] = os.environ) -> KeyRing:
    """All keys of the recipe and the environment. Raises UserError when one is malformed, or needed and absent."""
    for i, value in enumerate(settings.api_keys):
        if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise UserError(
                f"serve.api_keys[{i}] has {len(value)} characters and is no sha256 in hex (64 digits); "
                "make one with: printf %s YOUR-KEY | sha256sum"
            )
    in_clear = [key for key in re.split(r"[\s,]+", environ.get(settings.api_keys_env, "")) if key]
    ring = KeyRing([*(h.lower() for h in settings.api_keys), *map(hash_key, in_clear)])
    if not len(ring) and not settings.is_loopback:
        raise UserError(
            f"host {settings.host} can be reached from other machines, so API keys are required and none was given; "
            f"set the environment variable {settings.api_keys_env} or serve.api_keys, or use host 127.0.0.1"
        )
    return ring


class Auth:
    """ASGI middleware: `Authorization: Bearer KEY` on everything but /health; 401 otherwise."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not len(self.keys) or _is_health(scope["path"]):
            await self.app(scope, receive, send)
            return
        key = _bearer(scope["headers"])
        key_id = self.keys.identify(key) if key else None
        if key_id is None:
            await respond(Unauthorized(_refusal(key)))(scope, receive, send)
            return
        scope["state"]["key_id"] = key_id
        await self.app(scope, receive, send)


def _is_health(path: str) -> bool:
    return path == "/health" or path.startswith("/health/")


def _bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" else b""
    return b""


def _refusal(key: bytes) -> str:
    if key:
        return "this API key is not known here; ask whoever runs the server for one"
    return "an API key is required; send the header Authorization: Bearer YOUR-KEY"
