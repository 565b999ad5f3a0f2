"""The semantic layer of the result cache: a question that says the same as an earlier one gets that one's answer.

Off unless `cache.semantic.directory` names an encoder. Two questions meet only with the same owner, weights, sampling,
history and system prompt, when all that tells is equal (`semantic_text.py`) and their vectors are close. A share of the
answers is computed all the same and compared; too many wrong ones turn the layer off. Not here: where answers lie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge

from pingjia.gateway.ask import Ask
from pingjia.gateway.cache_key import Weights, cache_key
from pingjia.gateway.semantic_encoder import ChildEncoder, MeaningEncoder
from pingjia.gateway.semantic_text import Telling, equal_numbers, telling
from pingjia.gateway.settings import SemanticSettings
from pingjia.types import Request

log = logging.getLogger("pingjia.gateway")

_MAX_UNKNOWN = 0.1  # of a question's tokens; what an encoder does not know looks alike to it
_SAME_ANSWER = 0.9  # cosine of two answers to one question
_FEWEST_CHECKS = 20


@dataclass(frozen=True, slots=True)
class Topic:
    """A question and all that must be equal around it. `context` is a digest."""

    context: str
    text: str
    telling: Telling


@dataclass(frozen=True, slots=True)
class _Entry:
    owner: str
    text: str
    key: str


def topic_of(ask: Ask, requests: Sequence[Request], weights: Weights, owner: str) -> Topic | None:
    """None where only an equal question will do: raw text, several choices, tools, pictures, no user's last turn."""
    prompt = ask.prompts[0]
    if len(requests) > 1 or not isinstance(prompt, tuple) or ask.toolbox.listed or prompt[-1].role != "user":
        return None
    around = requests[0]
    if around.passed is not None:
        said = json.loads(around.passed.body)
        *history, last = said.pop("messages")
        if not isinstance(last.get("content"), str) or last.keys() > {"role", "content"} or said.get("tools"):
            return None
        body = json.dumps({**said, "history": history}, sort_keys=True)
        around = dataclasses.replace(around, passed=dataclasses.replace(around.passed, body=body))
    else:
        history = [dataclasses.asdict(message) for message in prompt[:-1]]
    found = telling(prompt[-1].content)
    if found is None:
        return None
    base = cache_key(dataclasses.replace(around, prompt_ids=()), weights, owner)
    told = json.dumps([base, history], sort_keys=True)
    return Topic(hashlib.sha256(told.encode()).hexdigest(), prompt[-1].content, found)


class Semantics:
    """What was asked, by what tells it apart. One per app; lives on the event loop.

    draw: a number from 0 to 1, by which hits are chosen for checks.
    """

    def __init__(
        self,
        settings: SemanticSettings,
        registry: CollectorRegistry,
        encoder: MeaningEncoder | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._encoder = encoder or (ChildEncoder(settings.directory) if settings.directory else None)
        self._draw = draw
        self._entries: OrderedDict[tuple[str, Telling], _Entry] = OrderedDict()
        self.is_on = self._encoder is not None
        self.num_checked = self.num_wrong = 0
        self._checks = Counter("pingjia_semantic_checks", "Checked hits by result", ["result"], registry=registry)
        on = Gauge("pingjia_semantic_on", "1 while the semantic cache gives answers", registry=registry)
        on.set_function(lambda: float(self.is_on))

    @property
    def has_encoder(self) -> bool:
        """Whether questions are remembered, also while the layer is off for what was found wrong."""
        return self._encoder is not None

    async def find(self, topic: Topic) -> str | None:
        """The key of the answer to a question that says the same, or None. Takes the encoder's few milliseconds only
        where everything that tells is equal already."""
        entry = self._entries.get((topic.context, topic.telling)) if self.is_on else None
        if entry is None or self._encoder is None:
            return None
        self._entries.move_to_end((topic.context, topic.telling))
        if entry.text == topic.text:
            return entry.key
        found = await self._encoder.encode([topic.text, entry.text])
        if found is None or max(found.unknown_N) > _MAX_UNKNOWN:
            return None
        return entry.key if float(found.vectors_NH[0] @ found.vectors_NH[1]) >= self._settings.threshold else None

    def add(self, topic: Topic, owner: str, key: str) -> None:
        """Remember a question whose answer is kept under `key`."""
        if self._encoder is None:
            return
        self._entries[topic.context, topic.telling] = _Entry(owner, topic.text, key)
        self._entries.move_to_end((topic.context, topic.telling))
        while len(self._entries) > self._settings.max_entries:
            self._entries.popitem(last=False)

    def forget(self, topic: Topic) -> None:
        """Its answer is not kept any more."""
        self._entries.pop((topic.context, topic.telling), None)

    def purge(self, owner: str | None) -> None:
        """Forget an owner's questions; of everybody, also what was found wrong: the layer is on again."""
        for place in [place for place, entry in self._entries.items() if owner in (None, entry.owner)]:
            del self._entries[place]
        if owner is None:
            self.num_checked = self.num_wrong = 0
            self.is_on = self._encoder is not None

    @property
    def wants_check(self) -> bool:
        """Whether the hit that was just given is to be checked. Drawn anew every time it is asked."""
        return self._draw() < self._settings.shadow_share

    async def judge(self, given: str, real: str) -> None:
        """Compare the answer that was given with the one that the question gets by itself."""
        is_right = given.strip() == real.strip() or await self._say_the_same(given, real)
        self.num_checked += 1
        self.num_wrong += not is_right
        self._checks.labels("right" if is_right else "wrong").inc()
        if self.is_on and self.num_wrong > self._settings.wrong_budget * max(self.num_checked, _FEWEST_CHECKS):
            self.is_on = False
            log.error(
                "the semantic cache is off: %d of %d checked answers were wrong, more than wrong_budget %g allows; "
                "DELETE /v1/cache?all=true with an admin's key, or a restart, turns it on again",
                self.num_wrong, self.num_checked, self._settings.wrong_budget,
            )  # fmt: skip

    async def _say_the_same(self, given: str, real: str) -> bool:
        if self._encoder is None or not equal_numbers(given, real):
            return False
        found = await self._encoder.encode([given, real])
        if found is None or max(found.unknown_N) > _MAX_UNKNOWN:
            return False
        return float(found.vectors_NH[0] @ found.vectors_NH[1]) >= _SAME_ANSWER

    async def close(self) -> None:
        if self._encoder is not None:
            await self._encoder.close()
