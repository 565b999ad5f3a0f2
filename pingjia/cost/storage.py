"""What keeping tuned models costs on disk: an adapter each, against a full checkpoint each. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from pingjia.errors import UserError


@dataclass(frozen=True, slots=True)
class StorageComparison:
    """Bytes on disk for `num_models` tuned models of one base. `share` is adapters over full checkpoints."""

    num_models: int
    full_bytes: int
    adapter_bytes: int

    @property
    def saved_bytes(self) -> int:
        return self.full_bytes - self.adapter_bytes

    @property
    def share(self) -> float:
        return float(Fraction(self.adapter_bytes, self.full_bytes))


def compare_storage(*, base_bytes: int, adapter_bytes: int, num_models: int = 1) -> StorageComparison:
    """`num_models` full checkpoints against one base with as many adapters (the base counts once, with them).

    Raises UserError for sizes that are no sizes.
    """
    if base_bytes <= 0 or adapter_bytes < 0 or num_models < 1:
        raise UserError(
            f"storage needs a base of more than 0 bytes, adapters of at least 0 and at least 1 model, "
            f"not {base_bytes}, {adapter_bytes} and {num_models}"
        )
    return StorageComparison(num_models, base_bytes * num_models, base_bytes + adapter_bytes * num_models)
