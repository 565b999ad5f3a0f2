"""Where an adapter comes from: the runs before it, their data and their held-out rows, as pingjia.json keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from peft import LoraConfig

from pingjia.errors import TrainingError
from pingjia.tune.checkpoint import ABOUT_FILE, ADAPTER_FILE
from pingjia.tune.ewc import FISHER_FILE, read_fisher

_CONFIG_FILE = "adapter_config.json"
# Ways to begin that leave the base as it is; the others (PiSSA, OLoRA, ...) of other tools have changed its weights.
_HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class Rows:
    """Files of rows, and which of their rows count."""

    files: tuple[str, ...]
    domains: tuple[str, ...] | None = None
    max_samples: int | None = None

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Rows:
        domains = value.get("domains")
        return cls(tuple(value["files"]), tuple(domains) if domains is not None else None, value.get("max_samples"))


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of a lineage. `method`: "new" for the first, else how it continued. `data_fingerprint`: of its files."""

    name: str
    method: str
    path: str
    run_fingerprint: str
    data: Rows
    data_fingerprint: str
    metrics: Mapping[str, Any]

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Stage:
        return cls(**{**value, "data": Rows.of(value["data"])})


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A finished adapter that a run continues from. `digest`: of its files; `stages`: oldest first, itself last."""

    path: Path
    digest: str
    config: LoraConfig
    tensors: Mapping[str, torch.Tensor]
    fisher: Mapping[str, torch.Tensor] | None
    stages: tuple[Stage, ...]
    probes: Mapping[str, Rows]
    accuracy: Sequence[Mapping[str, Any]]


def read_ancestor(path: Path, base: str, template_digest: str) -> Ancestor:
    """Read the adapter in `path`. TrainingError when it is no finished adapter of ours, or not of this base and
    template."""
    about = _about(path)
    _require_same(path, "base model", (about.get("base") or {}).get("fingerprint"), base)
    _require_same(path, "chat template", (about.get("chat") or {}).get("template_digest"), template_digest)
    try:
        config = LoraConfig.from_pretrained(str(path))
        tensors = safetensors.torch.load_file(path / ADAPTER_FILE)
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as e:
        raise TrainingError(f"{path}: the adapter cannot be read: {str(e).splitlines()[0]}") from None
    if not any(config.init_lora_weights is h or config.init_lora_weights == h for h in _HARMLESS_INIT):
        raise TrainingError(
            f"{path}: it began as {config.init_lora_weights!r}, which changes the base too; merge it (pingjia export) "
            "and continue from the merged model"
        )
    stages = stages_of(path, about)
    return Ancestor(
        path=path,
        digest=_digest(path),
        config=config,
        tensors=tensors,
        fisher=read_fisher(path, weights_digest(path)),
        stages=stages,
        probes=_probes(about, stages),
        accuracy=about.get("accuracy", []),
    )


def stages_of(path: Path, about: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Every run up to the one that made what is in `path`, oldest first."""
    return (*(Stage.of(stage) for stage in about.get("lineage", [])), stage_of(path, about))


def stage_of(path: Path, about: Mapping[str, Any]) -> Stage:
    """The run that made an adapter, from its pingjia.json."""
    recipe = about.get("recipe") or {}
    return Stage(
        name=free_name(Path(recipe.get("output_dir") or path).name, [s["name"] for s in about.get("lineage", [])]),
        method=(about.get("continual") or {}).get("method", "new"),
        path=str(path),
        run_fingerprint=about["run_fingerprint"],
        data=Rows.of({"files": about["data"]["files"], **_chosen(recipe)}),
        data_fingerprint=about["data"]["fingerprint"],
        metrics=about["metrics"],
    )


def held_out(recipe: Mapping[str, Any]) -> Rows | None:
    """The rows a run watched and did not learn."""
    files = recipe.get("eval_dataset")
    return Rows.of({"files": files, **_chosen(recipe)}) if files else None


def _chosen(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: recipe.get(key) for key in ("domains", "max_samples")}


def free_name(name: str, taken: Sequence[str]) -> str:
    """`name`, or with a number behind it where it is taken."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


def _probes(about: Mapping[str, Any], stages: Sequence[Stage]) -> dict[str, Rows]:
    """What was recorded; of a run that recorded none, its held-out rows."""
    if "probes" in about:
        return {name: Rows.of(rows) for name, rows in about["probes"].items()}
    rows = held_out(about.get("recipe") or {})
    return {stages[-1].name: rows} if rows else {}


def _about(path: Path) -> Mapping[str, Any]:
    try:
        about: Mapping[str, Any] = json.loads((path / ABOUT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not JSON"
        raise TrainingError(
            f"continue_from {path}: no finished adapter of pingjia there ({ABOUT_FILE}: {reason}); give the output_dir "
            "of a finished run"
        ) from None
    return about


def _require_same(path: Path, what: str, recorded: str | None, now: str) -> None:
    if recorded != now:
        raise TrainingError(
            f"continue_from {path}: that adapter was trained with another {what} ({str(recorded)[:12]}, not "
            f"{now[:12]}); what it learnt means nothing here. Use the model it was trained on"
        )


def weights_digest(path: Path) -> str:
    """sha256 of an adapter's weights."""
    return hashlib.sha256((path / ADAPTER_FILE).read_bytes()).hexdigest()


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    for name in (_CONFIG_FILE, ADAPTER_FILE, FISHER_FILE):
        if (path / name).exists():
            total.update((path / name).read_bytes() + b"\0")
    return total.hexdigest()
