"""Talking to another server over HTTP: its address, how long it asks to wait, and what it complains of.

For whoever asks an OpenAI-compatible server. Not here: what is asked, and when it is tried again.
"""

from __future__ import annotations

import email.utils
import ipaddress
import time

import httpx

from pingjia.errors import UserError

MAX_COMPLAINT = 200  # characters


def parse_url(base_url: str) -> httpx.URL:
    """A base URL, checked. Raises UserError when it is not http(s) or names no host."""
    try:
        url = httpx.URL(base_url)
        is_usable = url.scheme in ("http", "https") and bool(url.host)
    except (httpx.InvalidURL, UnicodeError) as e:  # UnicodeError: a host that is no internationalised name
        raise UserError(f"{base_url!r} is not a URL ({e}); example: http://127.0.0.1:8000/v1") from None
    if not is_usable:
        raise UserError(f"{base_url!r} is not an http(s) URL; example: http://127.0.0.1:8000/v1")
    return url


def is_loopback(host: str) -> bool:
    """Whether a host is this machine: a proxy has no business between."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def retry_after_s(response: httpx.Response) -> float | None:
    """Retry-After as seconds from now; it may also be a date. None when absent or not understood."""
    return seconds_to_wait(response.headers.get("retry-after", ""))


def seconds_to_wait(value: str) -> float | None:
    """The same of the header's value."""
    value = value.strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


def complaint(response: httpx.Response, secret: str | None = None) -> str:
    """The server's own words on one line, shortened; a `secret` (an API key) that it repeats is cut out."""
    try:
        error = response.json()["error"]
        words = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        words = response.text
    return shorten(words.replace(secret, "***") if secret else words) or response.reason_phrase or "no reason given"


def shorten(text: str) -> str:
    """On one line, and at most MAX_COMPLAINT characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= MAX_COMPLAINT else flat[: MAX_COMPLAINT - 1] + "…"
