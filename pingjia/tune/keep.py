"""How a run with a past ends: its adapter is put together, cut to a budget, judged by the gate, and kept or set aside.

It is first written to candidate/ and judged from there, so that what was judged is what is kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict

from pingjia.errors import TrainingError
from pingjia.models.family import Family
from pingjia.tune import elastic, ewc, grow
from pingjia.tune.checkpoint import ABOUT_FILE, ADAPTER_FILE, new_directory, write_adapter, write_bytes
from pingjia.tune.continual import SPRINGS, Course
from pingjia.tune.gate import Examine, Retention, RetentionError, failed, measure, refusal
from pingjia.tune.guards import require_nonzero_adapter
from pingjia.tune.lineage import weights_digest
from pingjia.types import Encoded

CANDIDATE = "candidate"
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of a run's result. `accuracy`: the matrix of scores, {"stage", "scores": {probe: score}} a row.

    `refused`: the error to raise when everything else has been seen to.
    """

    adapter_bytes: int
    retention: tuple[Retention, ...]
    accuracy: tuple[Mapping[str, Any], ...]
    refused: RetentionError | None


@dataclass(frozen=True, slots=True)
class Ranks:
    """Highest ranks in a module: the ancestor's, new ones, and what is kept; share of the squared norm lost by that."""

    old: int
    new: int
    kept: int
    lost_share: float


class Finish:
    """The end of one run; made before its first update. `first`: what a PiSSA began with."""

    def __init__(
        self, course: Course, model: PeftModel, family: Family, rows: Sequence[Encoded], first: Tensors
    ) -> None:
        self._course, self._model, self._family = course, model, family
        self._rows, self._first = rows, first
        self._old = grow.old_digest(model) if course.is_grown else ""

    def keep(self, output_dir: Path, about: Mapping[str, Any], examine: Examine | None) -> Kept:
        """Write, judge, promote. `about`: what pingjia.json says of the run itself."""
        candidate = output_dir / CANDIDATE
        tensors, config, ranks = self._put_together()
        springs_before = self._springs_of(tensors)
        about = {**about, **self._past(ranks)}
        with new_directory(candidate) as folder:
            self._write(folder, tensors, config)
            write_bytes(folder / ABOUT_FILE, _json(about))
        network = self._model.unload()
        if self._course.settings.continual.keep_fisher:
            self._write_fisher(network, candidate, springs_before)
        return self._judge(network, output_dir, about, examine)

    # ---- putting together

    def _put_together(self) -> tuple[Tensors | None, LoraConfig | None, Ranks | None]:
        """Tensors and configuration, None where the adapter in the network is the whole of it."""
        course, limit = self._course, self._course.settings.continual.max_rank
        if course.ancestor is None:
            return None, None, None
        own: Tensors = get_peft_model_state_dict(self._model, save_embedding_layers=False)
        require_nonzero_adapter(dict(own))
        config = self._model.peft_config[grow.NEW]
        if not course.is_grown and (limit is None or config.r <= limit):
            return None, None, Ranks(config.r, 0, config.r, 0.0)
        if course.is_grown:
            self._require_old_untouched()
        adapter = grow.grown(self._model) if course.is_grown else elastic.loras(own, config)
        kept, lost = elastic.cut(adapter, limit) if limit is not None else (adapter, 0.0)
        old = elastic.max_rank_of(elastic.loras(course.ancestor.tensors, course.ancestor.config))
        new = elastic.max_rank_of(elastic.loras(own, config)) if course.is_grown else 0
        return *elastic.as_peft(kept, config), Ranks(old, new, elastic.max_rank_of(kept), lost)

    def _require_old_untouched(self) -> None:
        if grow.old_digest(self._model) != self._old:
            raise TrainingError(
                "the frozen ranks of the earlier adapter have changed; nothing is saved. This is a fault of the "
                "program or of the memory: please report it with trainer_log.jsonl"
            )

    def _write(self, folder: Path, tensors: Tensors | None, config: LoraConfig | None) -> None:
        if tensors is None or config is None:
            write_adapter(folder, self._model, self._first)
            return
        config.save_pretrained(folder)
        write_bytes(folder / ADAPTER_FILE, safetensors.torch.save(dict(tensors), metadata={"format": "pt"}))

    def _past(self, ranks: Ranks | None) -> dict[str, Any]:
        """What pingjia.json says of earlier runs."""
        course = self._course
        probes = {"probes": {name: asdict(rows) for name, rows in course.sources.items()}} if course.sources else {}
        if course.ancestor is None:
            return probes
        s = course.settings.continual
        how = {
            "method": s.method,
            "continue_from": str(course.ancestor.path),
            "adapter_sha256": course.ancestor.digest,
            "ranks": asdict(ranks) if ranks else None,
            "replay": {"ratio": s.replay_ratio, "num_old_rows": len(course.replay)},
        }
        return {"continual": how, "lineage": [asdict(stage) for stage in course.ancestor.stages], **probes}

    # ---- Fisher information for the next run

    def _springs_of(self, tensors: Tensors | None) -> Tensors:
        """What held this run's weights, where they have kept their shape."""
        ancestor = self._course.ancestor
        return ancestor.fisher or {} if ancestor and not self._course.is_grown and tensors is None else {}

    def _write_fisher(self, network: Any, candidate: Path, before: Tensors) -> None:
        """Of this run's rows; added to what held the earlier tasks, else replayed rows stand for them."""
        model = PeftModel.from_pretrained(network, str(candidate), is_trainable=True)
        rows = [*self._rows, *([] if before else self._course.replay)]
        limit = self._course.settings.continual.fisher_rows
        values = ewc.fisher(model, self._family, ewc.spread(rows, limit))
        values = {name: value + before.get(name, 0) for name, value in values.items()}
        ewc.write_fisher(candidate, values, weights_digest(candidate))
        model.unload()

    # ---- judging

    def _judge(self, network: Any, output_dir: Path, about: Mapping[str, Any], examine: Examine | None) -> Kept:
        course, candidate = self._course, output_dir / CANDIDATE
        before = course.ancestor.path if course.ancestor else None
        batch_rows = course.settings.per_device_train_batch_size
        found: list[Retention] = []
        scores: dict[str, Any] = {"accuracy": []}
        if course.probes:
            found = measure(network, self._family, (before, candidate), course.probes, examine, batch_rows)
            scores = self._scores(found)
            write_bytes(candidate / ABOUT_FILE, _json({**about, **scores}))
        least = course.settings.continual.min_retention
        bad = failed(found, least)
        if bad:
            return Kept(0, tuple(found), tuple(scores["accuracy"]), refusal(bad, least, candidate))
        return Kept(promote(candidate, output_dir), tuple(found), tuple(scores["accuracy"]), None)

    def _scores(self, found: Sequence[Retention]) -> dict[str, Any]:
        """Retention of this run, and the accuracy matrix: stage -> probe -> score."""
        ancestor = self._course.ancestor
        first = ancestor.stages[-1].name if ancestor else "base"
        before = list(ancestor.accuracy) if ancestor and ancestor.accuracy else [_row(first, found, "before")]
        return {
            "retention": [r.to_dict() for r in found],
            "accuracy": [*before, _row(self._course.name, found, "after")],
        }


def promote(candidate: Path, output_dir: Path) -> int:
    """Move the candidate's files to where finished adapters are, pingjia.json last; return their bytes."""
    files = sorted(candidate.iterdir(), key=lambda file: file.name == ABOUT_FILE)
    size = sum(file.stat().st_size for file in files)
    for file in files:
        os.replace(file, output_dir / file.name)
    shutil.rmtree(candidate)
    shutil.rmtree(output_dir / SPRINGS, ignore_errors=True)
    return size


def _row(stage: str, found: Sequence[Retention], when: str) -> dict[str, Any]:
    return {"stage": stage, "scores": {r.probe: asdict(getattr(r, when)) for r in found}}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
