"""The text side of one request: tokens in, chunks out, and the decision that an answer has ended. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pingjia.chat import StreamDecoder
from pingjia.types import Chunk, FinishReason, Sampling, Usage

if TYPE_CHECKING:
    from pingjia.engine.sample import Pick


class StopStrings:
    """Finds stop strings in text that arrives in pieces, however it is cut into them.

    The answer ends at the first character at which any stop string is complete; the longest one complete there is cut
    off, or kept where `keeps` it. Text that may still become the start of one is held back.
    """

    def __init__(self, stops: tuple[str, ...], *, keeps: bool = False) -> None:
        self._stops = stops
        self._keeps = keeps
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return the text that is certain now, and whether a stop string ended it."""
        if not self._stops:
            return text, False
        new_from = len(self._held)
        self._held += text
        for end in range(new_from + 1, len(self._held) + 1):
            hit = max((len(s) for s in self._stops if self._held.endswith(s, 0, end)), default=0)
            if hit:
                certain, self._held = self._held[: end if self._keeps else end - hit], ""
                return certain, True
        keep = self._longest_start()
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain, False

    def flush(self) -> str:
        """What was held back, after the last piece."""
        held, self._held = self._held, ""
        return held

    def _longest_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stops)) - 1
        sizes = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in sizes if any(s.startswith(self._held[-n:]) for s in self._stops)), 0)


class Answer:
    """What has been said of one request. `push` per token until a chunk has a finish_reason, or `end` to cut it short.

    `token_ids` hold every sampled token, the one that ended the answer included; `text` holds neither that token's
    text nor a stop string (unless it was asked for) nor anything after it. Stop strings are looked for in what comes
    after the first `min_tokens` tokens.
    """

    def __init__(self, sampling: Sampling, stop_ids: frozenset[int], decoder: StreamDecoder, num_prompt: int) -> None:
        self._max_tokens = sampling.max_tokens
        self.stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else stop_ids)
        self._decoder = decoder
        self._min_tokens = sampling.min_tokens
        self._stops = StopStrings(sampling.stop, keeps=sampling.include_stop_str_in_output)
        self._num_prompt = num_prompt
        self._num_tokens = 0

    def push(self, pick: Pick, num_cached: int) -> Chunk:
        """The chunk of the next token; its text may be empty while characters or stop strings are incomplete."""
        self._num_tokens += 1
        reason: FinishReason | None = None
        if pick.token_id in self.stop_ids:
            text, reason = "", "stop"
        else:
            text, stopped = self._look(self._decoder.feed([pick.token_id]))
            if stopped:
                return self._chunk(text, pick, "stop", num_cached)
            reason = "stop" if pick.ends else "length" if self._num_tokens >= self._max_tokens else None
        if reason is not None:
            rest, reason = self._rest(reason)
            text += rest
        return self._chunk(text, pick, reason, num_cached)

    def _look(self, text: str) -> tuple[str, bool]:
        return (text, False) if self._num_tokens <= self._min_tokens else self._stops.push(text)

    def end(self, reason: FinishReason, num_cached: int, error: str | None = None) -> Chunk:
        """The last chunk of an answer that was cut short: what was held back, and why."""
        rest, _ = self._rest(reason)
        return Chunk(text=rest, finish_reason=reason, usage=self._usage(num_cached), error=error)

    def _rest(self, reason: FinishReason) -> tuple[str, FinishReason]:
        """Everything held back. A stop string that only this completes still counts.

        Bytes of a character that a cut left unfinished are dropped: a reader is never shown half of one.
        """
        text, stopped = self._stops.push(self._decoder.flush().rstrip("\ufffd"))
        return (text, "stop") if stopped else (text + self._stops.flush(), reason)

    def _chunk(self, text: str, pick: Pick, reason: FinishReason | None, num_cached: int) -> Chunk:
        logprobs = (pick.logprob,) if pick.logprob else ()
        usage = self._usage(num_cached) if reason else None
        return Chunk(text, (pick.token_id,), logprobs, reason, usage)

    def _usage(self, num_cached: int) -> Usage:
        return Usage(self._num_prompt, self._num_tokens, num_cached)
