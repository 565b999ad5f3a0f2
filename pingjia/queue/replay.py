"""Parts of an answer -> its chunks, each once, also when a second worker began it again. Pure.

A second worker computes the same tokens, because a queued request has a seed: an answer is then a function of the
request. So what was passed on already is skipped; where the second answer differs from it, the answer fails.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pingjia.errors import EngineError
from pingjia.queue.job import Part
from pingjia.types import Chunk, TokenLogprob


@dataclass(slots=True)
class _Line:
    """One choice: what was passed on, and what came of it again."""

    ids: tuple[int, ...] = ()
    text: str = ""
    again_ids: tuple[int, ...] = ()
    again_text: str = ""
    again_logprobs: tuple[TokenLogprob, ...] = ()
    is_behind: bool = False
    ended: bool = False


class Replay:
    """Takes the parts of one answer in order."""

    def __init__(self) -> None:
        self._delivery = 0
        self._lines: dict[int, _Line] = {}

    def take(self, part: Part) -> list[Chunk]:
        """The chunks that are new. Raises EngineError when a second answer is not the first one."""
        if part.delivery > self._delivery:
            self._delivery = part.delivery
            for line in self._lines.values():
                line.is_behind = bool(line.ids or line.text or line.ended)
                line.again_ids, line.again_text, line.again_logprobs = (), "", ()
        if part.delivery < self._delivery:
            return []  # of a worker that was given up
        return [new for chunk in part.chunks if (new := self._one(chunk)) is not None]

    def _one(self, chunk: Chunk) -> Chunk | None:
        line = self._lines.setdefault(chunk.index, _Line())
        if line.is_behind:
            return self._again(line, chunk)
        line.ids += chunk.token_ids
        line.text += chunk.text
        line.ended = chunk.finish_reason is not None
        return chunk

    def _again(self, line: _Line, chunk: Chunk) -> Chunk | None:
        if chunk.foreign:  # it cannot be cut where the first answer stood
            raise EngineError("the gateway that asked another server died in the middle of its answer; ask again")
        line.again_ids += chunk.token_ids
        line.again_text += chunk.text
        line.again_logprobs += chunk.logprobs
        is_last = chunk.finish_reason is not None
        if not is_last and (len(line.again_ids) < len(line.ids) or len(line.again_text) < len(line.text)):
            return None
        num, text = len(line.ids), line.text
        if line.again_ids[:num] != line.ids or not line.again_text.startswith(text):
            raise EngineError("the worker died, and another one did not come to the same answer; ask again")
        line.is_behind = False
        if line.ended:
            line.is_behind = True  # passed on whole already: nothing more may come of it
            return None
        if not is_last and len(line.again_ids) == num and len(line.again_text) == len(text):
            return None
        new = replace(
            chunk,
            token_ids=line.again_ids[num:],
            text=line.again_text[len(text) :],
            logprobs=line.again_logprobs[num:] if line.again_logprobs else (),
        )
        line.ids, line.text, line.ended = line.again_ids, line.again_text, is_last
        return new
