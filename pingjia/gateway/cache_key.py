"""When an answer may be given again, and to exactly which question. Pure.

Two requests have one key only if the same weights, asked the same tokens in the same way, must give the same answer to
the same owner. Everything a request says goes into the key, fields that do not exist yet included, unless it is named
here as having no effect on the answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Sequence
from typing import Any

from pingjia.types import ModelCard, Request, Sampling

_LAYOUT = 1
_NOT_IN_KEY = {"id", "trace", "adapter", "prompt_ids", "sampling"}
"""Fields of a request: id and trace name it, the adapter is in the digests, the others are written below."""


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """Digests of what answers. `adapter` is empty for the base model."""

    base: str
    adapter: str


def weights_of(card: ModelCard, cards: Sequence[ModelCard]) -> Weights | None:
    """The weights behind a card; None when a digest is not known, and so nothing may be kept."""
    if card.parent is None:
        return Weights(card.digest, "") if card.digest else None
    base = next((c for c in cards if c.parent is None and c.id == card.parent), None)
    if base is None or not base.digest or not card.digest:
        return None
    return Weights(base.digest, card.digest)


def is_repeatable(sampling: Sampling) -> bool:
    """Whether an equal question must get an equal answer: nothing is drawn, or what is drawn comes from a seed."""
    return sampling.temperature == 0 or sampling.seed is not None


def cache_key(request: Request, weights: Weights, owner: str) -> str:
    """The question as a digest, in hex."""
    said = {
        "layout": _LAYOUT,
        "owner": owner,
        "base": weights.base,
        "adapter": weights.adapter,
        "sampling": _fields(request.sampling, ()),
        "request": _fields(request, _NOT_IN_KEY),
    }
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=repr).encode())
    digest.update(b"\0")  # JSON holds none, so no text can be taken for the beginning of the tokens
    digest.update(array("q", request.prompt_ids).tobytes())
    return digest.hexdigest()


def _fields(value: Any, left_out: set[str] | tuple[str, ...]) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in left_out}
