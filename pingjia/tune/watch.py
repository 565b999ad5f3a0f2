"""When to stop, and when to make the adapter smaller: pure decisions over the held-out loss.

Both are told after every look at the held-out rows. Their state is a few numbers that go into every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

NUM_GAPS = 3


@dataclass(slots=True)
class Watch:
    """What the looks so far have come to. `num_worse`: looks in a row without a better loss.

    `gaps`: held-out loss minus the training loss since the look before, of the last NUM_GAPS looks.
    """

    best_loss: float | None = None
    best_step: int = 0
    num_worse: int = 0
    gaps: list[float] = field(default_factory=list)

    def look(self, step: int, eval_loss: float, train_loss: float) -> bool:
        """Take note of a look after update `step`; True when it is the best so far."""
        self.gaps = [*self.gaps, eval_loss - train_loss][-NUM_GAPS:]
        if self.best_loss is None or eval_loss < self.best_loss:
            self.best_loss, self.best_step, self.num_worse = eval_loss, step, 0
            return True
        self.num_worse += 1
        return False

    def should_stop(self, patience: int | None) -> bool:
        """Whether `patience` looks in a row were no better than the best."""
        return patience is not None and self.num_worse >= patience

    def is_overfitting(self) -> bool:
        """Whether the gap between held-out and training loss opens: it grew at the last two looks, and the last look
        was no better than the best."""
        return self.num_worse > 0 and len(self.gaps) == NUM_GAPS and self.gaps[0] < self.gaps[1] < self.gaps[2]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Watch:
        return cls(**value)
