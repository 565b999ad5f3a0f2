"""What one engine serves under which name: the base model, and adapters that come and go."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from pingjia.chat import Tokenizer
from pingjia.engine.adapters import Adapter, read_adapter
from pingjia.engine.lora import AdapterRows, attach, detach
from pingjia.engine.token_rows import attach_rows, detach_rows
from pingjia.errors import ModelError, ModelNotFound
from pingjia.models import base_fingerprint
from pingjia.types import ModelCard


@dataclass(frozen=True, slots=True)
class Base:
    """The base model under its served name. `root` is where it came from."""

    name: str
    root: str
    model: PreTrainedModel
    tokenizer: Tokenizer


class Served:
    """Names -> models. Adapters are told apart by the digest of their files, not by name: a name may be used again."""

    def __init__(self, base: Base, max_model_len: int) -> None:
        self.base = base
        self._max_model_len = max_model_len
        self.rows = AdapterRows()
        self._fingerprint = base_fingerprint(base.model)
        self._created = int(time.time())
        self._adapters: dict[str, tuple[Adapter, int]] = {}

    def cards(self) -> list[ModelCard]:
        """The base first, then the adapters in the order they were loaded."""
        base = self.base
        own = ModelCard(base.name, base.root, None, self._max_model_len, self._created)
        return [own] + [
            ModelCard(name, str(adapter.path), base.name, self._max_model_len, created)
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

    def load(self, name: str, path: str | Path, num_users: int) -> None:
        """Serve the adapter at `path` as `name`. The same files again change nothing; other files replace the old ones.

        Raises ModelError when they cannot be served (see read_adapter) or `num_users` requests still use the old ones.
        """
        if name == self.base.name or not name:
            raise ModelError(f"adapter name {name!r}: choose a name other than the base model's")
        adapter = read_adapter(path, self.base.model, self.base.tokenizer, self._fingerprint)
        if name in self._adapters:
            if self._adapters[name][0].digest == adapter.digest:
                return
            self.unload(name, num_users)
        if not self._is_attached(adapter):
            attach(self.base.model, adapter.digest, adapter.weights, self.rows)
            attach_rows(self.base.model, adapter.digest, adapter.token_rows, self.rows)
        self._adapters[name] = (adapter, int(time.time()))

    def unload(self, name: str, num_users: int) -> None:
        """Stop serving `name`. Raises ModelNotFound, or ModelError while `num_users` requests use it."""
        if self.digest(name) is None:
            raise ModelError(f"{name} is the base model; it cannot be unloaded")
        if num_users:
            raise ModelError(
                f"adapter {name} is in use by {num_users} unfinished requests; try again when they have ended"
            )
        adapter, _ = self._adapters.pop(name)
        if not self._is_attached(adapter):
            detach(self.base.model, adapter.digest)
            detach_rows(self.base.model, adapter.digest)

    def _is_attached(self, adapter: Adapter) -> bool:
        return any(other.digest == adapter.digest for other, _ in self._adapters.values())
