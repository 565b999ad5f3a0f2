"""The file of keys: what is written of a key, who may use one, and that changes are obeyed while it is read."""

from __future__ import annotations

import json
import multiprocessing
import os
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.errors import UserError
from pingjia.gateway.auth import KeyRing, load_keys
from pingjia.gateway.keys import Key, KeyFile, parse_expiry
from pingjia.gateway.settings import GatewaySettings

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture
def file(tmp_path):
    return KeyFile(tmp_path / "keys.json")


def test_a_key_is_found_and_not_written_down(file):
    new = file.create("alice", requests_per_minute=3)
    found = file.find(new.secret.encode())
    assert (found.name, found.requests_per_minute) == ("alice", 3)
    written = file.path.read_text()
    secret = new.secret.rpartition("-")[2]
    assert secret not in written
    assert secret[:16] not in written
    assert os.stat(file.path).st_mode & 0o077 == 0


def test_equal_keys_would_have_other_hashes(file):
    one, two = (file.create(name).key for name in "ab")
    assert one.salt != two.salt
    assert one.digest != two.digest


@pytest.mark.parametrize(
    "spoil",
    [
        lambda k: k[:-1],
        lambda k: k + "0",
        lambda k: k.upper(),
        lambda k: "x" + k[1:],
        lambda k: k[:-1] + "g",
        str.title,
    ],
)
def test_a_key_that_is_nearly_right_is_unknown(file, spoil):
    secret = file.create("a").secret
    assert file.find(spoil(secret).encode()) is None


def test_a_secret_does_not_open_another_id(file):
    one, two = file.create("a"), file.create("b")
    mixed = f"pj-{two.key.id}-{one.secret.rpartition('-')[2]}"
    assert file.find(mixed.encode()) is None


@given(st.binary(max_size=80))
def test_bytes_are_no_key(tmp_path_factory, data):
    assert KeyFile(tmp_path_factory.getbasetemp() / "none.json").find(data) is None


def test_changes_are_obeyed_at_once(file):
    reader = KeyFile(file.path)
    one = file.create("a")
    assert reader.find(one.secret.encode()).revoked_at is None
    two = file.create("b")
    assert reader.find(two.secret.encode()).name == "b"
    file.revoke("a")
    assert reader.find(one.secret.encode()).revoked_at is not None


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"version": 2, "keys": []}', '{"version": 1, "keys": [{"id": "x"}]}']
)
def test_a_damaged_file_leaves_the_keys_as_they_were(file, damage, caplog):
    secret = file.create("a").secret.encode()
    assert file.find(secret) is not None
    file.path.write_text(damage)
    assert file.find(secret) is not None
    assert "stay as they were" in caplog.text
    with pytest.raises(UserError, match=r"keys\.json"):
        file.create("b")


def test_a_missing_file_leaves_them_too(file, caplog):
    secret = file.create("a").secret.encode()
    assert file.find(secret) is not None
    file.path.unlink()
    assert file.find(secret) is not None
    assert "is gone" in caplog.text


def test_names_are_used_once_while_in_force(file):
    file.create("a")
    with pytest.raises(UserError, match="already"):
        file.create("a")
    file.revoke("a")
    file.create("a")
    assert [key.revoked_at is None for key in file.read()] == [False, True]


@pytest.mark.parametrize("name", ["", " a", "a\n", "a,b", "x" * 101])
def test_odd_names_are_refused(file, name):
    with pytest.raises(UserError, match="key name"):
        file.create(name)


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"monthly_budget_cny": -1.0}, "monthly_budget_cny"),
        ({"monthly_budget_cny": float("nan")}, "monthly_budget_cny"),
        ({"priority": 101}, "priority"),
        ({"request_per_minute": 1}, "request_per_minute"),
    ],
)
def test_odd_limits_are_refused_and_nothing_is_written(file, limits, field):
    with pytest.raises(UserError, match=field):
        file.create("a", **limits)
    assert file.read() == []


def _make(path: str, start: int) -> None:
    for i in range(10):
        KeyFile(path).create(f"{start}-{i}")


def test_processes_that_write_at_once_lose_nothing(file):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_make, args=(str(file.path), n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert len(file.read()) == 40
    assert [p.name for p in file.path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_full_disk_leaves_the_old_file(file, monkeypatch):
    file.create("a")
    before = file.path.read_text()

    def refuse(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        file.create("b")
    assert file.path.read_text() == before
    assert sorted(p.name for p in file.path.parent.iterdir()) == ["keys.json", "keys.json.lock"]


def test_a_link_stays_a_link(file, tmp_path):
    file.create("a")
    link = tmp_path / "link.json"
    link.symlink_to(file.path)
    KeyFile(link).create("b")
    assert link.is_symlink()
    assert len(file.read()) == 2


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("90d", NOW + timedelta(days=90)),
        ("12h", NOW + timedelta(hours=12)),
        ("2026-12-31", datetime(2027, 1, 1, tzinfo=UTC)),
        ("2026-12-31T12:00+08:00", datetime(2026, 12, 31, 4, tzinfo=UTC)),
        ("2026-12-31T12:00", datetime(2026, 12, 31, 12, tzinfo=UTC)),
    ],
)
def test_expiry(text, when):
    assert parse_expiry(text, NOW) == when


@pytest.mark.parametrize("text", ["", "soon", "0d", "2026-11-23", "-3d", "90"])
def test_no_expiry(text):
    with pytest.raises(UserError, match="expires"):
        parse_expiry(text, NOW)


def test_expired_is_at_the_very_time():
    key = Key(id="", expires_at=NOW)
    assert key.is_expired(NOW)
    assert not key.is_expired(NOW - timedelta(microseconds=1))


def test_owners_never_meet():
    """A tenant called like a key's id is another owner."""
    keys = [Key(id="a"), Key(id="b"), Key(id="a", tenant="a"), Key(id="b", tenant="key a"), Key(id="")]
    assert len({key.owner for key in keys}) == 5
    assert Key(id="a", tenant="t").owner == Key(id="b", tenant="t").owner


def test_an_empty_file_lets_nobody_in(file):
    file.create("a")
    file.revoke("a")
    ring = load_keys(GatewaySettings(keys_file=str(file.path), host="0.0.0.0"), {})
    assert not ring.is_open
    assert KeyRing().is_open


def test_a_file_that_is_not_there_is_said_at_once(tmp_path):
    with pytest.raises(UserError, match="pingjia keys create"):
        load_keys(GatewaySettings(keys_file=str(tmp_path / "k.json")), {})


def test_over_http(start, file):
    new, plain = file.create("a"), "sk-plain"
    gone = file.create("gone")
    file.revoke("gone")
    late = file.create("late", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    from pingjia.gateway import hash_key

    gateway = start(keys_file=str(file.path), api_keys=(hash_key(plain),))

    def ask(secret):
        response = gateway.http.get("/v1/models", headers={"authorization": f"Bearer {secret}"})
        return response.status_code, json.loads(response.text).get("error", {}).get("message", "")

    assert ask(new.secret)[0] == 200
    assert ask(plain)[0] == 200
    assert "revoked" in ask(gone.secret)[1]
    assert "expired" in ask(late.secret)[1]
    assert ask(new.secret[:-1] + "z")[0] == 401
    file.revoke("a")
    assert ask(new.secret)[0] == 401
    assert ask(file.create("b").secret)[0] == 200
