"""API keys: who may call. Keys are kept and compared as sha256; logs and the ledger see a short piece of the hash.

Keys of the recipe and the environment have no limits; those of a key file (`keys.py`) bring theirs along.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from pingjia.errors import UserError
from pingjia.gateway.errors import Unauthorized, respond
from pingjia.gateway.keys import Key, KeyFile
from pingjia.gateway.settings import GatewaySettings

_ID_DIGITS = 12


def hash_key(key: str) -> str:
    """sha256 of a key in hex, as `api_keys` wants it."""
    return hashlib.sha256(key.encode()).hexdigest()


class KeyRing:
    """The known keys: hashes, and a file. Without either everybody is let in; an empty file lets nobody in."""

    def __init__(self, hashes: Iterable[str] = (), file: KeyFile | None = None) -> None:
        self._hashes = tuple(dict.fromkeys(hashes))
        self._file = file

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not self._hashes and self._file is None

    def named_with_budget(self) -> list[str]:
        """Names of keys in force that have a monthly budget. Raises UserError for a file that cannot be read."""
        keys = self._file.read() if self._file is not None else []
        return [key.name for key in keys if key.monthly_budget_cny is not None and key.revoked_at is None]

    def find(self, key: bytes) -> Key | None:
        """The key these bytes are, in force or not; None for an unknown one."""
        key_id = self.identify(key)
        if key_id is not None:
            return Key(id=key_id)
        return self._file.find(key) if self._file is not None else None

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
    ring = KeyRing([*(h.lower() for h in settings.api_keys), *map(hash_key, in_clear)], _key_file(settings))
    if ring.is_open and not settings.is_loopback:
        raise UserError(
            f"host {settings.host} can be reached from other machines, so API keys are required and none was given; "
            f"set serve.keys_file, the environment variable {settings.api_keys_env} or serve.api_keys, or use host "
            "127.0.0.1"
        )
    return ring


def _key_file(settings: GatewaySettings) -> KeyFile | None:
    if settings.keys_file is None:
        return None
    file = KeyFile(settings.keys_file)
    if not Path(settings.keys_file).expanduser().is_file():
        advice = f"make a first key: pingjia keys create NAME --file {settings.keys_file}"
        raise UserError(f"serve.keys_file: {settings.keys_file} is no file; {advice}")
    file.read()
    return file


class Auth:
    """ASGI middleware: `Authorization: Bearer KEY` on everything but /health; 401 otherwise."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.keys.is_open or _is_health(scope["path"]):
            await self.app(scope, receive, send)
            return
        key = _bearer(scope["headers"])
        found = self.keys.find(key) if key else None
        reason = _refusal(key) if found is None else _ended(found)
        if found is None or reason is not None:
            await respond(Unauthorized(reason or ""))(scope, receive, send)
            return
        scope["state"].update(key_id=found.id, key=found)
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


def _ended(key: Key) -> str | None:
    if key.revoked_at is not None:
        return f"this API key was revoked on {key.revoked_at:%Y-%m-%d}; ask whoever runs the server for another one"
    if key.is_expired(datetime.now(UTC)):
        return (
            f"this API key expired on {key.expires_at:%Y-%m-%d %H:%M %Z}; ask whoever runs the server for another one"
        )
    return None
