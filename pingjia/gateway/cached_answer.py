"""An answer as it is kept: its pieces, so that it can be streamed again, as compact JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from pingjia.types import Chunk, TokenLogprob, Usage

_PER_PIECE = 8  # chunks that become one: a stream still comes in pieces, and costs little to keep and to replay


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """`chunks` end with the last finish reason. `made_at`: UNIX time. `seconds`: what it took to compute."""

    chunks: tuple[Chunk, ...]
    made_at: float
    seconds: float

    def dump(self) -> bytes:
        rows = [_row(chunk) for chunk in compact(self.chunks)]
        return json.dumps([self.made_at, self.seconds, rows], ensure_ascii=False, separators=(",", ":")).encode()

    def replay(self) -> list[Chunk]:
        """The chunks as an answer to somebody else."""
        return list(map(reused, self.chunks))


def load(data: bytes) -> CachedAnswer:
    """What `dump` wrote. Raises ValueError for anything else."""
    try:
        made_at, seconds, rows = json.loads(data)
        chunks = tuple(map(_chunk, rows))
    except (TypeError, KeyError, IndexError, RecursionError) as e:
        raise ValueError(f"no cached answer: {e}") from None
    if not chunks or chunks[-1].finish_reason is None:
        raise ValueError("no cached answer: it has no end")
    return CachedAnswer(chunks, float(made_at), float(seconds))


def compact(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The same answer in fewer pieces; what ends a choice or counts tokens stays by itself."""
    pieces: list[Chunk] = []
    for (_, plain), group in groupby(chunks, key=lambda c: (c.index, _is_plain(c))):
        run = list(group)
        step = _PER_PIECE if plain else 1
        pieces += [_join(run[i : i + step]) for i in range(0, len(run), step)]
    return pieces


def _is_plain(chunk: Chunk) -> bool:
    return chunk.finish_reason is None and chunk.usage is None and not chunk.foreign


def reused(chunk: Chunk) -> Chunk:
    """The chunk for somebody for whom the prompt was not computed."""
    if chunk.usage is None:
        return chunk
    return replace(chunk, usage=replace(chunk.usage, cached_tokens=chunk.usage.prompt_tokens))


def _join(run: Sequence[Chunk]) -> Chunk:
    if len(run) == 1:
        return run[0]
    return Chunk(
        text="".join(c.text for c in run),
        token_ids=_chain(c.token_ids for c in run),
        logprobs=_chain(c.logprobs for c in run),
        index=run[0].index,
    )


def _chain(parts: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(item for part in parts for item in part)


def _row(chunk: Chunk) -> list[Any]:
    logprobs = [[entry.token_id, entry.logprob, entry.top] for entry in chunk.logprobs]
    usage = chunk.usage and [chunk.usage.prompt_tokens, chunk.usage.completion_tokens, chunk.usage.cached_tokens]
    return [chunk.text, chunk.token_ids, logprobs, chunk.finish_reason, usage, chunk.index, chunk.foreign]


def _chunk(row: list[Any]) -> Chunk:
    text, ids, logprobs, finish_reason, usage, index, foreign = row if len(row) > 6 else [*row, ""]
    return Chunk(
        text=text,
        token_ids=tuple(ids),
        logprobs=tuple(TokenLogprob(i, p, tuple((t, q) for t, q in top)) for i, p, top in logprobs),
        finish_reason=finish_reason,
        usage=None if usage is None else Usage(*usage),
        index=index,
        foreign=foreign,
    )
