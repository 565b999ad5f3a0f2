"""The retention gate: what earlier tasks scored before and after a run, and whether that is enough to keep the result.

Losses are measured here; answers are asked for by whoever calls (`Examine`), because a room that answers is not ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from pingjia.errors import TrainingError
from pingjia.models.family import Family
from pingjia.tune.step import build_batch, mean_loss
from pingjia.types import Encoded, Example

Examine = Callable[[PreTrainedModel, Sequence[Path | None], Sequence[Example]], list[list[bool]] | None]
"""examine(network, adapters, questions): for each adapter directory (None: the network alone), whether its answers to
the questions state all their facts; None when they cannot be asked. It may take the network over."""


class RetentionError(TrainingError):
    """A run after which earlier tasks are answered worse than allowed; its adapter is in candidate/."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Questions of one task, with and as token ids. `is_earlier`: the gate judges by it."""

    name: str
    examples: tuple[Example, ...]
    rows: tuple[Encoded, ...]
    is_earlier: bool


@dataclass(frozen=True, slots=True)
class Score:
    """`loss`: nats per learnt token. `facts`: share of the questions with facts whose answer states them all; None when
    none was asked."""

    loss: float
    facts: float | None = None
    num_questions: int = 0


@dataclass(frozen=True, slots=True)
class Retention:
    """One probe before and after a run."""

    probe: str
    is_earlier: bool
    before: Score
    after: Score

    @property
    def by(self) -> str:
        """What the share is of: "facts", or "likelihood" where no fact was stated before either."""
        return "facts" if self.before.facts and self.after.facts is not None else "likelihood"

    @property
    def share(self) -> float:
        """What is left of the score before: exact facts, else the likelihood of a learnt token."""
        if self.before.facts and self.after.facts is not None:
            return self.after.facts / self.before.facts
        return math.exp(self.before.loss - self.after.loss)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"by": self.by, "share": round(self.share, 4)}


def measure(
    network: PreTrainedModel,
    family: Family,
    adapters: tuple[Path | None, Path],
    probes: Sequence[Probe],
    examine: Examine | None,
    batch_rows: int,
) -> list[Retention]:
    """Every probe with the adapter before and the one after (None: the network alone)."""
    losses = [_losses(network, family, adapter, probes, batch_rows) for adapter in adapters]
    facts = _facts(network, adapters, probes, examine)
    return [
        Retention(
            probe.name,
            probe.is_earlier,
            *(Score(losses[i][probe.name], *facts[i].get(probe.name, (None, 0))) for i in (0, 1)),
        )
        for probe in probes
    ]


def failed(found: Sequence[Retention], min_retention: float) -> list[Retention]:
    """Earlier probes of which less than the least share is left."""
    return [r for r in found if r.is_earlier and r.share < min_retention]


def refusal(bad: Sequence[Retention], min_retention: float, candidate: Path) -> RetentionError:
    """The error that names every probe with its numbers."""
    each = "; ".join(f"{r.probe}: {_shown(r)}, {r.share:.1%} left" for r in bad)
    return RetentionError(
        f"not promoted: {len(bad)} earlier probe(s) kept less than min_retention {min_retention:.1%} ({each}). The "
        f"adapter is in {candidate}; raise continual.replay_ratio (or the penalty), or lower continual.min_retention "
        "and run again to promote it as it is"
    )


def _shown(r: Retention) -> str:
    if r.by == "facts":
        return f"exact facts {r.before.facts:.1%} -> {r.after.facts:.1%} of {r.after.num_questions} questions"
    return f"loss {r.before.loss:.3f} -> {r.after.loss:.3f}"


def _losses(
    network: PreTrainedModel, family: Family, adapter: Path | None, probes: Sequence[Probe], batch_rows: int
) -> dict[str, float]:
    model: Any = network if adapter is None else PeftModel.from_pretrained(network, str(adapter))
    found = {}
    for probe in probes:
        parts = [probe.rows[i : i + batch_rows] for i in range(0, len(probe.rows), batch_rows)]
        batches = [build_batch(part, family, network.config, network.device) for part in parts]
        found[probe.name] = mean_loss(model, batches)
    if adapter is not None:
        model.unload()
    return found


def _facts(
    network: PreTrainedModel, adapters: Sequence[Path | None], probes: Sequence[Probe], examine: Examine | None
) -> list[Mapping[str, tuple[float, int]]]:
    """For each adapter: probe -> (share of questions whose facts are all stated, questions)."""
    asked = [(probe.name, example) for probe in probes for example in probe.examples if example.facts]
    if examine is None or not asked:
        return [{} for _ in adapters]
    right = examine(network, adapters, [example for _, example in asked])
    if right is None:
        return [{} for _ in adapters]
    return [_by_probe([name for name, _ in asked], marks) for marks in right]


def _by_probe(names: Sequence[str], marks: Sequence[bool]) -> dict[str, tuple[float, int]]:
    found: dict[str, list[bool]] = {}
    for name, mark in zip(names, marks, strict=True):
        found.setdefault(name, []).append(mark)
    return {name: (sum(own) / len(own), len(own)) for name, own in found.items()}
