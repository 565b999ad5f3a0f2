"""What an OpenAI-compatible server sends, as chunks: its events, its whole answers, its complaints. Pure: bytes in.

A piece that is text alone becomes a plain chunk. What else a server says (calls of tools, reasoning, log-probabilities)
is kept word for word in `Chunk.foreign`. Not here: sockets, and what happens after a failure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pingjia.errors import PingjiaError, RequestError, UpstreamBusy, UpstreamFailed
from pingjia.remote import shorten
from pingjia.types import Chunk, FinishReason, Usage

MAX_EVENT = 2_000_000  # bytes; a server that says more in one event has lost its mind
DONE = b"[DONE]"
_MAX_WORDS = 2_000
_BUSY_S = 1.0  # to wait where a server does not say
_REASONS: dict[str, FinishReason] = {"length": "length", "max_tokens": "length"}
_TEXT_ALONE = {"role", "content"}


class EventReader:
    """Bytes of an event stream, however they were cut, -> the data of its events. Comments and names are skipped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> Iterator[bytes]:
        """The data of the events that became whole. Raises UpstreamFailed for one that is too large."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT:
            raise UpstreamFailed(f"it sent an event of more than {MAX_EVENT} bytes")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                data, self._data = b"\n".join(self._data), []
                yield data


class AnswerReader:
    """The events of one answer -> its chunks. The last one is made by `end`, when the server's count has come too.

    num_prompt: what the prompt is taken to have when the server counts nothing.
    """

    def __init__(self, num_prompt: int = 0) -> None:
        self.usage: Usage | None = None
        self.is_done = False
        self._num_prompt = num_prompt
        self._num_pieces = 0
        self._reason: str | None = None

    def read(self, data: bytes) -> Chunk | None:
        """What an event adds to the answer. Raises UpstreamFailed, or what an error event says."""
        if data == DONE:
            self.is_done = True
            return None
        document = _object(data)
        _raise_error(document)
        if isinstance(usage := document.get("usage"), Mapping):
            self.usage = _usage(usage)
        choice = _first(document)
        return self._piece(choice) if choice is not None else None

    def read_whole(self, data: bytes) -> Chunk | None:
        """The same of an answer in one piece, from a server that does not stream."""
        document = _object(data)
        _raise_error(document)
        self.is_done = True
        if isinstance(usage := document.get("usage"), Mapping):
            self.usage = _usage(usage)
        choice = _first(document)
        if choice is None:
            raise UpstreamFailed(f"its answer has no choices: {shorten(data.decode('utf-8', 'replace'))}")
        return self._piece(_as_delta(choice))

    def end(self) -> Chunk:
        """The last chunk. Raises UpstreamFailed when the answer has no end."""
        if self._reason is None and not (self.is_done and self._num_pieces):
            raise UpstreamFailed("its answer broke off without an end")
        said = self._reason or "stop"
        reason: FinishReason = _REASONS.get(said, "stop")
        foreign = "" if said == reason else json.dumps({"delta": {}, "finish_reason": said})
        return Chunk(finish_reason=reason, usage=self.usage or self._estimate(), foreign=foreign)

    @property
    def has_begun(self) -> bool:
        return self._num_pieces > 0

    @property
    def has_said_nothing(self) -> bool:
        """Whether nothing at all came of it: no piece, no end, no reason."""
        return self._num_pieces == 0 and self._reason is None and not self.is_done

    def _piece(self, choice: Mapping[str, Any]) -> Chunk | None:
        if (reason := choice.get("finish_reason")) is not None:
            self._reason = str(reason)
        delta = choice.get("delta")
        said = {k: v for k, v in (delta if isinstance(delta, Mapping) else choice).items() if v not in (None, "", [])}
        text, logprobs = said.get("content" if isinstance(delta, Mapping) else "text", ""), choice.get("logprobs")
        if not isinstance(text, str):
            raise UpstreamFailed(f"the text of its answer is a {type(text).__name__}")
        is_plain = not logprobs and (not isinstance(delta, Mapping) or said.keys() <= _TEXT_ALONE)
        if is_plain and not text:
            return None
        self._num_pieces += 1
        return Chunk(text, foreign="" if is_plain else _kept(choice))

    def _estimate(self) -> Usage:
        """A token for every piece, which is what servers send."""
        return Usage(self._num_prompt, self._num_pieces)


def _kept(choice: Mapping[str, Any]) -> str:
    """The choice without what this side writes: its number, and how it ends, which comes last."""
    kept = {k: v for k, v in choice.items() if k not in ("index", "finish_reason")}
    if not isinstance(kept.get("delta", {}), Mapping):
        del kept["delta"]
    return json.dumps(kept, ensure_ascii=False)


def _object(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise UpstreamFailed(f"it sent what is no answer of OpenAI's API: {shorten(data.decode('utf-8', 'replace'))}")
    return document


def _first(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Its first choice; one answer is asked for at a time."""
    choices = document.get("choices")
    if not choices:
        return None
    if not isinstance(choices, list) or not isinstance(choices[0], Mapping):
        raise UpstreamFailed("its answer's choices are not in the form of OpenAI's API")
    return choices[0]


def _as_delta(choice: Mapping[str, Any]) -> dict[str, Any]:
    """The choice of a whole answer as a stream would have it."""
    message = choice.get("message")
    if not isinstance(message, Mapping):
        return dict(choice)
    calls = message.get("tool_calls")
    calls = calls if isinstance(calls, list) else []
    numbered = [{"index": i, **call} for i, call in enumerate(calls) if isinstance(call, Mapping)]
    rest = {k: v for k, v in choice.items() if k != "message"}
    return {**rest, "delta": {**message, "tool_calls": numbered} if numbered else dict(message)}


def _usage(raw: Mapping[str, Any]) -> Usage:
    details = raw.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else 0
    counts = (raw.get("prompt_tokens"), raw.get("completion_tokens"), cached)
    return Usage(*(max(0, n) if isinstance(n, int) else 0 for n in counts))


# ---- complaints


def _raise_error(document: Mapping[str, Any]) -> None:
    """An error that comes instead of a piece of the answer."""
    if document.get("error") or document.get("object") == "error":
        said = Complaint(document)
        raise UpstreamFailed(f"it ended its answer with an error: {said.words or 'no reason given'}")


class Complaint:
    """What an error body says: OpenAI's envelope, vLLM's older one, FastAPI's detail, or any text."""

    def __init__(self, body: Any) -> None:
        error = body.get("error", body) if isinstance(body, Mapping) else body
        fields = error if isinstance(error, Mapping) else {}
        words = fields.get("message") or fields.get("detail") or ("" if isinstance(error, Mapping) else error)
        text = words if isinstance(words, str) else json.dumps(words, ensure_ascii=False)
        self.words = " ".join(text.split())[:_MAX_WORDS]
        self.param = _text(fields.get("param"))
        self.code = _text(fields.get("code")) or _text(fields.get("type"))


def _text(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) and value else None


def refusal(status: int, body: bytes, retry_after_s: float | None, secret: str | None = None) -> PingjiaError:
    """The error that a status other than 200 amounts to. `secret`, an API key, is cut out of the server's words.

    RequestError: the client's fault, and no other server would say otherwise. UpstreamBusy and UpstreamFailed: another
    might.
    """
    text = body.decode("utf-8", "replace")
    text = text.replace(secret, "***") if secret else text
    try:
        said = Complaint(json.loads(text))
    except (ValueError, RecursionError):
        said = Complaint(text)
    words = said.words or "no reason given"
    if status in (429, 503):
        wait_s = _BUSY_S if retry_after_s is None else retry_after_s
        return UpstreamBusy(f"the server behind this gateway takes no more now: {words}",
                            retry_after_s=wait_s, status=status)  # fmt: skip
    if status in (401, 403):
        return UpstreamFailed(f"it refuses this gateway's key ({status}: {shorten(words)}); see upstream.servers")
    if status < 400 or status >= 500 or status in (404, 405, 408):
        return UpstreamFailed(f"it answers {status}: {shorten(words)}")
    return RequestError(words, param=said.param, code=said.code)
