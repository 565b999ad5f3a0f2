"""What one engine serves under which name: the base model, and adapters that come and go while requests run.

A name stands for the latest files loaded under it. Requests keep the weights they began with: those stay beside the
network, nameless, until the last request that uses them has ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from pingjia.chat import Tokenizer
from pingjia.engine.adapters import Adapter, read_adapter
from pingjia.engine.lora import AdapterRows, attach, detach
from pingjia.engine.token_rows import attach_rows, detach_rows
from pingjia.errors import ModelError, ModelNotFound
from pingjia.models import base_fingerprint
from pingjia.models.digest import weights_digest
from pingjia.types import ModelCard


@dataclass(frozen=True, slots=True)
class Base:
    """The base model under its served name. `root` is where it came from."""

    name: str
    root: str
    model: PreTrainedModel
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """Adapters under names of their own at a time, and the rank of each: together they bound the memory."""

    max_loras: int
    max_lora_rank: int


class Served:
    """Names -> models. Adapters are told apart by the digest of their files, not by name."""

    def __init__(self, base: Base, max_model_len: int, limits: AdapterLimits) -> None:
        self.base = base
        self._max_model_len = max_model_len
        self._limits = limits
        self.rows = AdapterRows()
        self._fingerprint = base_fingerprint(base.model)
        self._digest = weights_digest(base.model)
        self._created = int(time.time())
        self._adapters: dict[str, tuple[Adapter, int]] = {}
        self._attached: set[str] = set()

    def cards(self) -> list[ModelCard]:
        """The base first, then the adapters in the order they were loaded."""
        base = self.base
        own = ModelCard(base.name, base.root, None, self._max_model_len, self._created, self._digest)
        return [own] + [
            ModelCard(name, str(adapter.path), base.name, self._max_model_len, created, adapter.digest)
            for name, (adapter, created) in list(self._adapters.items())
        ]

    def digest(self, name: str | None) -> str | None:
        """The digest of the adapter called `name`; None for the base. Raises ModelNotFound."""
        if name is None or name == self.base.name:
            return None
        if name not in self._adapters:
            raise ModelNotFound(
                f"no model or adapter {name!r} is served; served: {', '.join(c.id for c in self.cards())}"
            )
        return self._adapters[name][0].digest

    def read(self, name: str, path: str | Path) -> Adapter:
        """The adapter at `path`, checked but not served yet. Changes nothing; may take a while.

        Raises ModelError when it cannot be served (see read_adapter) or its name is taken.
        """
        if name == self.base.name or not name:
            raise ModelError(f"adapter name {name!r}: choose a name other than the base model's")
        model, tokenizer = self.base.model, self.base.tokenizer
        return read_adapter(path, model, tokenizer, self._fingerprint, max_rank=self._limits.max_lora_rank)

    def put(self, name: str, adapter: Adapter) -> None:
        """Serve an adapter as `name` from now on. Equal files change nothing; other files replace the old ones.

        Raises ModelError when there are too many.
        """
        if name in self._adapters and self._adapters[name][0].digest == adapter.digest:
            return
        self._refuse_crowd(name, adapter)
        if adapter.digest not in self._attached:
            attach(self.base.model, adapter.digest, adapter.weights, self.rows)
            attach_rows(self.base.model, adapter.digest, adapter.token_rows, self.rows)
            self._attached.add(adapter.digest)
        self._adapters[name] = (adapter, int(time.time()))

    def unload(self, name: str) -> None:
        """Stop serving `name`. Raises ModelNotFound, or ModelError for the base."""
        if self.digest(name) is None:
            raise ModelError(f"{name} is the base model; it cannot be unloaded")
        del self._adapters[name]

    def is_nameless(self, digest: str) -> bool:
        """Whether no new request can ask for these weights."""
        return all(adapter.digest != digest for adapter, _ in self._adapters.values())

    def release(self, in_use: Iterable[str | None]) -> bool:
        """Free the weights that have no name and are not in use; return whether there were any. Not during a step."""
        in_use = set(in_use)
        idle = {digest for digest in self._attached - in_use if self.is_nameless(digest)}
        for digest in idle:
            detach(self.base.model, digest)
            detach_rows(self.base.model, digest)
        self._attached -= idle
        return bool(idle)

    def _refuse_crowd(self, name: str, adapter: Adapter) -> None:
        most = self._limits.max_loras
        if name not in self._adapters and len(self._adapters) >= most:
            raise ModelError(
                f"adapter {name}: {most} adapters are loaded, which is engine.max_loras; unload one or raise it"
            )
        nameless = [digest for digest in self._attached - {adapter.digest} if self.is_nameless(digest)]
        if len(nameless) >= most:
            raise ModelError(
                f"adapter {name}: {len(nameless)} replaced adapters are still in use by unfinished requests; try again "
                "when they have ended"
            )
