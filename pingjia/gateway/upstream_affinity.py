"""A conversation goes to the server that has computed its beginning before. Pure.

The policy is `pingjia.cluster.affinity`; it looks at token ids, which a gateway before other servers has not. Here the
characters of the messages stand for them: they begin alike exactly where the prompts do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pingjia.cluster.affinity import PrefixAffinity
from pingjia.gateway.replicas import Replica
from pingjia.types import Request

_MIN_CHARS = 512  # some 128 tokens of English; what is shorter is computed faster than it is worth
_MAX_CHARS = 16_384


class TextAffinity:
    """A `Policy`. One object per gateway."""

    def __init__(self) -> None:
        self._affinity = PrefixAffinity(min_tokens=_MIN_CHARS)

    def choose(self, replicas: Sequence[Replica], request: Request) -> Replica:
        """One of `replicas`; there is at least one."""
        ids = tuple(map(ord, beginning(request)))
        return self._affinity.choose(replicas, replace(request, prompt_ids=ids))


def beginning(request: Request) -> str:
    """The start of what is asked: a conversation's next turn only adds to it."""
    if request.passed is None:
        return ""
    said = json.loads(request.passed.body)
    if "messages" in said:
        tools = json.dumps(said.get("tools") or [], sort_keys=True)
        return "".join([tools, *map(_turn, said["messages"])])[:_MAX_CHARS]
    return json.dumps(said.get("prompt"), ensure_ascii=False)[:_MAX_CHARS]


def _turn(message: dict[str, Any]) -> str:
    return json.dumps(message, ensure_ascii=False, sort_keys=True)
