"""A conversation goes to the replica that has computed its beginning before, where that pays; else balance. Pure.

What pays: replicas keep the keys and values of prompts they have seen, so the next turn of a conversation is cheap
where the last one was. The beginning of the prompt names the conversation. Two cases are left to balance: prompts too
short to matter, and beginnings that everybody shares (a system prompt), which every replica has in its cache anyway.

Fits `pingjia.gateway.replicas.Policy` without importing it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar

from pingjia.cluster.ring import BoundedRing
from pingjia.types import Request

MIN_TOKENS = 128
_MAX_KEYS = 20_000
_HALVE_EVERY = 2_000  # requests: what was popular an hour ago says nothing


class Candidate(Protocol):
    """A replica as the policy sees it. num_outstanding: answers in work there."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def num_outstanding(self) -> int: ...


C = TypeVar("C", bound=Candidate)


class Popularity:
    """How often beginnings of prompts were seen lately; tells which ones are no conversation's own."""

    def __init__(self) -> None:
        self._counts: OrderedDict[bytes, float] = OrderedDict()
        self._total = 0.0
        self._num_since = 0

    def count(self, key: bytes) -> None:
        self._counts[key] = self._counts.pop(key, 0.0) + 1.0
        if len(self._counts) > _MAX_KEYS:
            self._counts.popitem(last=False)

    def next_request(self) -> None:
        self._total += 1.0
        self._num_since += 1
        if self._num_since >= _HALVE_EVERY:
            self._num_since, self._total = 0, self._total / 2
            self._counts = OrderedDict((key, n / 2) for key, n in self._counts.items() if n > 1.0)

    def is_shared(self, key: bytes, num_replicas: int) -> bool:
        """Whether so many ask it that one replica could not answer them all: half of its fair share, and 8 times."""
        return self._counts.get(key, 0.0) > max(8.0, self._total / (2 * num_replicas))


class Beginnings:
    """Prompt -> key of its conversation, or None where affinity does not pay.

    The key is of the first `min_tokens`, of twice as many where these are shared, and so on. is_causal False: the
    model reuses only equal whole prompts (ChatGLM-6B reads its prompt both ways), so the whole prompt is the key.
    """

    def __init__(self, *, min_tokens: int = MIN_TOKENS, is_causal: bool = True) -> None:
        self._min_tokens = min_tokens
        self._is_causal = is_causal
        self._popularity = Popularity()

    def key_of(self, request: Request, num_replicas: int) -> bytes | None:
        ids, owner = request.prompt_ids, (request.adapter or "").encode()
        if len(ids) < self._min_tokens:
            return None
        if not self._is_causal:
            return _digest(owner, ids)
        self._popularity.next_request()
        length = self._min_tokens
        while length <= len(ids):
            key = _digest(owner, ids[:length])
            self._popularity.count(key)
            if not self._popularity.is_shared(key, num_replicas):
                return key
            length *= 2
        return None


def _digest(owner: bytes, ids: Sequence[int]) -> bytes:
    return blake2b(array("q", ids).tobytes(), digest_size=16, key=owner[:64]).digest()


class PrefixAffinity:
    """A policy: `choose(replicas, request)`. One object per gateway; deterministic, no clock, no sockets.

    spread: how far above its fair share a replica may be loaded before a conversation moves on (above 1).
    """

    def __init__(self, *, min_tokens: int = MIN_TOKENS, spread: float = 1.25, is_causal: bool = True) -> None:
        self._beginnings = Beginnings(min_tokens=min_tokens, is_causal=is_causal)
        self._spread = spread
        self._ring = BoundedRing({"": 1.0}, spread=spread)
        self._of: dict[str, int] = {}

    def choose(self, replicas: Sequence[C], request: Request) -> C:
        """One of `replicas`; there is at least one."""
        key = self._beginnings.key_of(request, len(replicas))
        if key is None:
            return least_loaded(replicas)
        by_name = {replica.name: replica for replica in replicas}
        num_in_work = sum(replica.num_outstanding for replica in replicas)
        ring = self._ring_of(replicas)
        return by_name[ring.pick(key, lambda name: by_name[name].num_outstanding, num_in_work)]

    def _ring_of(self, replicas: Sequence[C]) -> BoundedRing:
        weights = {replica.name: replica.weight for replica in replicas}
        wanted = BoundedRing.points_of(weights)
        if wanted != self._of:
            self._ring, self._of = BoundedRing(weights, spread=self._spread), wanted
        return self._ring


def least_loaded(replicas: Sequence[C]) -> C:
    """The one with the least in work for its weight, the new answer counted."""
    return min(replicas, key=lambda r: ((r.num_outstanding + 1) / r.weight, r.name))
