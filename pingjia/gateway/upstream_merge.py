"""The pieces of another server's answer -> one choice, as its API would have given it unstreamed. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


def merged_chat(pieces: Iterable[str]) -> dict[str, Any]:
    """A choice of a whole chat answer, without index: `message`, `logprobs`, `finish_reason` (or null).

    pieces: as `Completion.foreign` has them; one that is text alone is {"text": ...}.
    """
    message: dict[str, Any] = {"role": "assistant", "content": None}
    whole: dict[str, Any] = {"message": message, "logprobs": None, "finish_reason": None}
    for choice in map(json.loads, pieces):
        text = choice.pop("text", "")
        _add(message, choice.pop("delta", {"content": text} if text else {}))
        _add(whole, choice)
    for call in message.get("tool_calls") or ():  # always what `_calls` made
        call.pop("index", None)
    return whole


def merged_text(pieces: Iterable[str]) -> dict[str, Any]:
    """The same of a completion: `text`, `logprobs`, `finish_reason`."""
    whole: dict[str, Any] = {"text": "", "logprobs": None, "finish_reason": None}
    for choice in map(json.loads, pieces):
        choice.pop("delta", None)
        _add(whole, choice)
    return whole


def _add(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Texts and lists go behind what is there, objects into it, anything else in its place."""
    for key, value in more.items():
        there = into.get(key)
        if value is None:
            into.setdefault(key, None)
        elif key == "role" or there is None:
            into[key] = _calls([], value) if key == "tool_calls" else value
        elif isinstance(there, str) and isinstance(value, str):
            into[key] = there + value
        elif key == "tool_calls":
            into[key] = _calls(there, value)
        elif isinstance(there, list) and isinstance(value, list):
            into[key] = there + value
        elif isinstance(there, dict) and isinstance(value, Mapping):
            _add(there, value)
        else:
            into[key] = value


def _calls(there: list[dict[str, Any]], more: Any) -> list[dict[str, Any]]:
    """Calls of tools with pieces added by their number; only their arguments come in pieces."""
    calls = {call["index"]: call for call in there}
    for piece in more if isinstance(more, list) else ():
        if isinstance(piece, Mapping):
            number = piece.get("index")
            number = number if isinstance(number, int) else len(calls)
            _add_call(calls.setdefault(number, {"index": number, "function": {"arguments": ""}}), piece)
    return list(calls.values())


def _add_call(call: dict[str, Any], piece: Mapping[str, Any]) -> None:
    call |= {k: v for k, v in piece.items() if v and k not in ("index", "function")}
    said = piece.get("function")
    if isinstance(said, Mapping):
        told = call["function"]
        told |= {k: v for k, v in said.items() if v and k != "arguments"}
        told["arguments"] += said["arguments"] if isinstance(said.get("arguments"), str) else ""
