"""API keys with limits: a file of them, what each may do, and how one is made. Not here: who asks for one (`auth.py`).

The file is JSON, `{"version": 1, "keys": [...]}`, replaced as a whole under a lock. A key is `pj-ID-SECRET`; the file
holds the id and a salted sha256 of the whole key, never the key. The secret has 192 random bits, so that a slow hash
would protect nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from pingjia.errors import UserError
from pingjia.recipe import Section

log = logging.getLogger("pingjia.gateway")

_VERSION = 1
_UNITS = {"d": "days", "h": "hours"}
_KEY = re.compile(rb"pj-([0-9a-f]{12})-[0-9a-f]{48}")
_NAME = re.compile(r"[^\s\x00-\x1f,](?:[^\x00-\x1f,]{0,98}[^\s\x00-\x1f,])?")


class Key(Section):
    """One key and what it may do. None: no limit. `id` is what logs and the ledger call it.

    models: which may be asked; all when empty. tenant: keys of one tenant share cached answers; their own when empty.
    admin: may act on other tenants. priority: the higher one is served first.
    """

    id: str = Field(pattern="^[0-9a-f]{0,12}$")
    name: str = ""
    salt: str = ""
    digest: str = ""
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    max_concurrent: int | None = Field(None, ge=1)
    monthly_budget_cny: float | None = Field(None, ge=0, allow_inf_nan=False)
    models: tuple[str, ...] = ()
    tenant: str = ""
    priority: int = Field(0, ge=-100, le=100)
    admin: bool = False
    created_at: datetime | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None

    @property
    def owner(self) -> str:
        """Whose answers these are: no two owners ever see each other's."""
        return f"tenant {self.tenant}" if self.tenant else f"key {self.id}"

    def is_expired(self, now: datetime) -> bool:
        return self.expires_at is not None and now >= self.expires_at

    def may_use(self, model: str) -> bool:
        return not self.models or model in self.models

    def fits(self, key: bytes) -> bool:
        """Whether this is the key; takes the same time for every key."""
        return hmac.compare_digest(_digest(self.salt, key), self.digest)


NOBODY = Key(id="", admin=True)
"""Who asks where no keys are needed: the only one there is."""


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made. `secret` is the key itself, which nobody can show again."""

    key: Key
    secret: str


class KeyFile:
    """The keys of one file. `find` follows its changes; a file that cannot be read leaves the keys as they were.

    Several processes may read and write at once.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self.path = Path(path).expanduser()
        self._now = now
        self._seen: tuple[int, ...] | None = None
        self._by_id: dict[str, Key] = {}

    def read(self) -> list[Key]:
        """All keys in the file, revoked ones too; none when there is no file. Raises UserError for another file."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{self.path}: the keys cannot be read: {e}") from None
        return _parse(text, self.path)

    def find(self, key: bytes) -> Key | None:
        """The key in force that these bytes are, revoked and expired ones too; None when it is not in the file."""
        self._follow()
        match = _KEY.fullmatch(key)
        found = self._by_id.get(match[1].decode()) if match else None
        return found if found is not None and found.fits(key) else None

    def create(self, name: str, **limits: Any) -> NewKey:
        """Make a key and write it down. Raises UserError for a name that is taken or a limit that is none."""
        _check_name(name)
        key_id, salt = secrets.token_hex(6), secrets.token_hex(16)
        secret = f"pj-{key_id}-{secrets.token_hex(24)}"
        fields = {"id": key_id, "name": name, "salt": salt, "digest": _digest(salt, secret.encode())}
        key = _checked({**fields, "created_at": self._now(), **limits})
        with self._writing() as keys:
            if any(k.name == name and k.revoked_at is None for k in keys):
                raise UserError(f"{self.path}: there is a key named {name!r} already; revoke it or choose another name")
            keys.append(key)
        return NewKey(key, secret)

    def revoke(self, name: str) -> Key:
        """End a key, by its name or id. Its line stays, so that the ledger can be read. Raises UserError for none."""
        with self._writing() as keys:
            i = keys.index(self.named(name, keys))
            keys[i] = keys[i].model_copy(update={"revoked_at": self._now()})
            return keys[i]

    def named(self, name: str, keys: Sequence[Key] | None = None) -> Key:
        """The key of that name or id, in force rather than revoked. Raises UserError naming those there are."""
        keys = self.read() if keys is None else keys
        found = [key for key in keys if name in (key.name, key.id) and key.revoked_at is None]
        if not found:
            names = ", ".join(key.name or key.id for key in keys if key.revoked_at is None) or "none"
            raise UserError(f"{self.path}: no key named {name!r} is in force; there are: {names}")
        return found[0]

    def _follow(self) -> None:
        seen = self._state()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            keys = self.read() if seen is not None else None
        except UserError as e:
            log.error("%s; the keys stay as they were", e)
            return
        if keys is None:
            log.error("%s: the file of keys is gone; the keys stay as they were", self.path)
        else:
            self._by_id = {key.id: key for key in keys}

    def _state(self) -> tuple[int, ...] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    @contextmanager
    def _writing(self) -> Iterator[list[Key]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The lock has a file of its own: the keys' file is replaced, and a lock on the old one would hold nobody off.
        with open(self.path.with_name(self.path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = self.read()
            yield keys
            _replace(self.path, _written(keys))


def parse_expiry(text: str, now: datetime) -> datetime:
    """`90d`, `12h`, a date (its end, UTC) or a time in ISO 8601 -> the time. Raises UserError for one in the past."""
    if match := re.fullmatch(r"(\d{1,5})([dh])", text):
        when = now + timedelta(**{_UNITS[match[2]]: int(match[1])})
    else:
        when = _parse_time(text)
    if when <= now:
        raise UserError(f"expires {text!r} is in the past; give a later time, for example 90d")
    return when


def _parse_time(text: str) -> datetime:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"expires {text!r} is no time; write 90d, 12h, 2030-12-31 or 2030-12-31T12:00+08:00") from None
    if re.fullmatch(r"\d{4}-?\d\d-?\d\d", text):
        when += timedelta(days=1)
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _digest(salt: str, key: bytes) -> str:
    return hashlib.sha256(salt.encode() + b":" + key).hexdigest()


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"key name {name!r}: 1 to 100 characters without commas and line ends, no space at either end")


def _checked(fields: dict[str, Any]) -> Key:
    try:
        return Key.model_validate(fields)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        raise UserError(f"{'.'.join(map(str, error['loc']))}: {error['msg'].lower()}, not {error['input']!r}") from None


class _File(Section):
    version: int = Field(ge=_VERSION, le=_VERSION)
    keys: list[Key]


_FILE = TypeAdapter(_File)


def _parse(text: str, path: Path) -> list[Key]:
    try:
        keys = _FILE.validate_json(text).keys
    except ValidationError as e:
        error = e.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, error["loc"])) or "the file"
        raise UserError(f"{path}: {where}: {error['msg'].lower()}; `pingjia keys` writes this file") from None
    if len({key.id for key in keys}) < len(keys):
        raise UserError(f"{path}: two keys have one id; remove one of them")
    return keys


def _written(keys: list[Key]) -> str:
    rows = [key.model_dump(mode="json", exclude_defaults=True) for key in keys]
    return json.dumps({"version": _VERSION, "keys": rows}, ensure_ascii=False, indent=1) + "\n"


def _replace(link: Path, text: str) -> None:
    """Write next to the file, then put it in its place: a reader sees the old keys or the new, and a crash the old."""
    path = link.resolve()
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # readable by its owner alone
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
