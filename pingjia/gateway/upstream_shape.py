"""An answer that another server gave in more than text, in the envelope that every answer here has. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pingjia.gateway.responses import Out
from pingjia.types import Completion

Merge = Callable[[Iterable[str]], dict[str, Any]]
"""The pieces of an answer as one choice (`upstream_merge.py`)."""


class Written(Out):
    """JSON that is not checked again: it is what the other server wrote."""

    document: dict[str, Any]

    def dump(self) -> bytes:
        return json.dumps(self.document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def with_foreign(answer: Out, completions: Sequence[Completion], merge: Merge) -> Out:
    """The whole answer, with the choices that are more than text as their server wrote them."""
    if not any(completion.foreign for completion in completions):
        return answer
    document = json.loads(answer.dump())
    for i, completion in enumerate(completions):
        if completion.foreign:
            choice = merge(completion.foreign)
            reason = choice.pop("finish_reason") or completion.finish_reason
            document["choices"][i] = {"index": i, **choice, "finish_reason": reason}
    return Written(document=document)


def with_foreign_piece(event: Out, foreign: str) -> Out:
    """One event of one choice, with that choice as its server wrote it."""
    document = json.loads(event.dump())
    choice = json.loads(foreign)
    reason = choice.pop("finish_reason", None) or document["choices"][0]["finish_reason"]
    document["choices"][0] |= {**choice, "finish_reason": reason}
    return Written(document=document)
