"""What is known of a server from its address and its answers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from pingjia.errors import UserError
from pingjia.remote import MAX_COMPLAINT, complaint, is_loopback, parse_url, retry_after_s


@pytest.mark.parametrize("text", ["ftp://a/v1", "http://", "localhost:8000", "http://xn--/v1", "http://[::1", ""])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UserError, match=r"is not an? (http\(s\) )?URL.*; example: http://127\.0\.0\.1:8000/v1"):
        parse_url(text)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("[::1]", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("a.b", False),
    ],
)
def test_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(("value", "expected"), [("3", 3.0), ("-1", 0.0), ("soon", None), ("", None), ("inf", None)])
def test_how_long_to_wait(value: str, expected: float | None) -> None:
    assert retry_after_s(httpx.Response(429, headers={"Retry-After": value})) == expected


def test_a_date_to_wait_for() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90))
    assert retry_after_s(httpx.Response(503, headers={"Retry-After": later})) == pytest.approx(90, abs=3)


def test_the_servers_own_words() -> None:
    assert complaint(httpx.Response(400, json={"error": {"message": "too\n long"}})) == "too long"
    assert complaint(httpx.Response(400, json={"error": "no"})) == "no"
    assert complaint(httpx.Response(502, text="<html>bad gateway</html>")) == "<html>bad gateway</html>"
    assert complaint(httpx.Response(503)) == "Service Unavailable"
    assert len(complaint(httpx.Response(400, text="x" * 999))) == MAX_COMPLAINT


def test_a_key_that_the_server_repeats_is_cut_out() -> None:
    answer = httpx.Response(401, json={"error": {"message": "bad key sk-secret!"}})
    assert complaint(answer, "sk-secret") == "bad key ***!"
