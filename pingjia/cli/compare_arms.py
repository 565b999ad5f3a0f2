"""The arms of `pingjia cost compare`: what each trains, and its `pingjia train` in a process of its own.

A finished step (a trial of a rate, an arm, a way to serve) is noted in stages/ and not made again; a run that was
killed goes on at its checkpoint.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import pingjia
from pingjia.cli.schema import FLAT, Recipe
from pingjia.cli.stages import Stages, digest
from pingjia.cost.compare import Arm, Point
from pingjia.errors import TrainingError, UserError

ARMS: dict[str, dict[str, Any]] = {  # what sets it apart in a recipe
    "full": {"finetuning_type": "full"},
    "lora": {"finetuning_type": "lora"},
    "qlora_int8": {"finetuning_type": "lora", "quantization_bit": 8},
    "qlora_int4": {"finetuning_type": "lora", "quantization_bit": 4},
}
FULL_RATE_SHARE = 0.1  # of an adapter's rate: what is tried first for the network's own weights
TRIED_SHARES = (1.0, 1 / 3)  # of an arm's first rate, where rates are tried
# Of a recipe, what would make arms unlike each other, or has no meaning in a short run.
_LEFT_OUT = (
    "quantization_bit", "quantization_method", "quantization_type", "double_quantization", "phases", "phase_mode",
    "layer_learning_rates", "loraplus_lr_ratio", "shrink_lora_rank_to", "early_stopping_patience", "continue_from",
    "continual", "train_new_tokens", "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules",
    "distributed", "resume_from_checkpoint", "num_train_epochs", "max_steps",
)  # fmt: skip
_OF_ADAPTERS = (
    "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "lora_layers", "lora_rank_pattern", "use_rslora",
    "use_dora", "init_lora_weights", "lora_l2",
)  # fmt: skip
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Length:
    """How long arms train. `look`: updates between two looks at the held-out rows; `trial`: updates of a trial."""

    updates: int = 20
    look: int = 4
    trial: int = 4

    def check(self) -> None:
        """Raises UserError for a comparison that could not come to anything."""
        if self.updates < 2 or not 1 <= self.look <= self.updates:
            raise UserError(
                f"--updates {self.updates} with --look {self.look}: at least 2 updates, and a look within them"
            )


class Arms:
    """Runs arms in `folder`. `held_out`: the file of rows that all are measured on; `say` gets lines of progress."""

    def __init__(
        self, recipe: Recipe, folder: Path, held_out: Path, length: Length, say: Callable[[str], None]
    ) -> None:
        self._recipe, self._folder, self._held_out, self._length, self._say = recipe, folder, held_out, length, say
        self._stages = Stages(folder)
        self._data = _fingerprint([*recipe.data.dataset, str(held_out)])

    def run(self, name: str) -> Arm:
        """Its trials, then its run at the better rate."""
        first = first_rate(name, self._recipe.tune.learning_rate)
        trials = {rate: self._trial(name, rate) for rate in self._rates(first)}
        finite = {rate: loss for rate, loss in trials.items() if loss == loss}
        best = min(finite, key=lambda rate: finite[rate]) if finite else first
        found = self._train(name, best, self._length.updates, self._length.look, "run")
        start = Point(0, 0, 0, self._loss_before(name))
        curve = (start, *(Point(**point) for point in found.pop("curve")))
        shown = {f"{rate:g}": loss for rate, loss in trials.items()}
        return Arm(name=name, rate=best, curve=curve, trials=shown, **found)

    def result_of(self, name: str) -> Path:
        """Where an arm's run has left what it trained."""
        return self._folder / name / "run"

    def _rates(self, first: float) -> Sequence[float]:
        return [first * share for share in TRIED_SHARES] if self._length.trial else []

    def _trial(self, name: str, rate: float) -> float:
        updates = self._length.trial
        found = self._train(name, rate, updates, updates, f"trial-{rate:g}")
        loss: float = found["curve"][-1]["loss"]
        self._say(f"{name}, rate {rate:g}: held-out loss {loss:.4f} after {updates} updates")
        return loss

    def _train(self, name: str, rate: float, updates: int, look: int, what: str) -> dict[str, Any]:
        out = self._folder / name / what
        recipe = recipe_of(self._recipe, name, self._held_out)
        recipe |= {"learning_rate": rate, "max_steps": updates, "eval_steps": look, "output_dir": str(out)}
        recipe |= {"save_steps": max(look, updates // 2), "save_total_limit": 1}
        inputs = digest((), recipe, self._data, pingjia.__version__)
        known = self._stages.result(f"{name}.{what}", inputs)
        if known is not None and (what != "run" or (out / "pingjia.json").exists()):
            self._say(f"{name}, {what}: measured already")
            return dict(known)
        _start_over_if_other(out, inputs)
        self._say(f"{name}, {what}: {updates} updates at rate {rate:g}")
        file = out / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
        run_child([*_command("pingjia.cli.main"), "train", str(file)], out / "train.log")
        found = measured(out)
        self._stages.finish(f"{name}.{what}", inputs, found)
        _drop(out, whole=what != "run")
        return found

    def _loss_before(self, name: str) -> float:
        """Of the network that the arm begins with, packed as it is there. An adapter begins at nothing, so that a full
        run and a plain adapter begin at the same."""
        name = "lora" if name == "full" else name
        recipe = recipe_of(self._recipe, name, self._held_out)
        inputs = digest((), recipe, self._data, pingjia.__version__)
        known = self._stages.result(f"{name}.before", inputs)
        if known is not None:
            return float(known)
        file = self._folder / name / "before.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
        loss = run_child([*_command("pingjia.cli.compare_start"), str(file)], self._folder / name / "before.log")[
            "loss"
        ]
        self._stages.finish(f"{name}.before", inputs, loss)
        return float(loss)


def first_rate(name: str, rate: float) -> float:
    """The rate of an arm for a recipe's rate, which is an adapter's."""
    return rate * FULL_RATE_SHARE if name == "full" else rate


def recipe_of(recipe: Recipe, name: str, held_out: Path) -> dict[str, Any]:
    """The arm's own recipe, flat: the same rows, batch and schedule for all."""
    sections = recipe.model_dump(mode="json", include=set(FLAT), exclude_unset=True)
    flat = {key: value for section in sections.values() for key, value in section.items()}
    unwanted = (*_LEFT_OUT, *(_OF_ADAPTERS if name == "full" else ()))
    kept = {key: value for key, value in flat.items() if key not in unwanted}
    steady = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "report_to": ["none"]}
    return kept | steady | ARMS[name] | {"eval_dataset": [str(held_out)]}


def measured(out: Path) -> dict[str, Any]:
    """What a finished run came to, from its own files."""
    about = json.loads((out / "pingjia.json").read_text(encoding="utf-8"))
    lines = (out / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    files = ("adapter_model.safetensors", "adapter_config.json", "config.json")
    kept = [f for f in out.iterdir() if f.name in files or f.name.startswith(("model", "tokenizer"))]
    return {
        "curve": curve([json.loads(line) for line in lines]),
        "num_trainable": _num_trainable(out),
        "peak_bytes": about["metrics"]["peak_bytes"],
        "stored_bytes": sum(f.stat().st_size for f in kept if f.is_file()),
    }


def curve(logs: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """A point for every look, from the lines of trainer_log.jsonl; the looks' own time is in none of them."""
    points, seconds, tokens = [], 0.0, 0
    for log in logs:
        seconds, tokens = seconds + log["seconds"], tokens + log["num_tokens"]
        if log.get("eval_loss") is not None:
            loss = log["eval_loss"]
            points.append({"updates": log["step"], "seconds": round(seconds, 4), "tokens": tokens, "loss": loss})
    return points


def _num_trainable(out: Path) -> int:
    """Numbers in the safetensors files that a run has left, read from their headers."""
    total = 0
    for file in [*out.glob("adapter_model.safetensors"), *out.glob("model*.safetensors")]:
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        total += sum(math.prod(shape) for shape in shapes)
    return total


def _start_over_if_other(out: Path, inputs: str) -> None:
    """What a killed run of equal inputs has left is gone on from; anything else in its place is removed."""
    note = out / "inputs"
    if out.exists() and (not note.exists() or note.read_text(encoding="utf-8") != inputs):
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(inputs, encoding="utf-8")


def _drop(out: Path, *, whole: bool) -> None:
    """Of a trial nothing is needed any more, of an arm no checkpoint."""
    for folder in [out] if whole else out.glob("checkpoint-*"):
        shutil.rmtree(folder)


def _fingerprint(files: Sequence[str]) -> str:
    from pingjia import data

    return data.fingerprint(files)


def _command(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def run_child(command: Sequence[str], log: Path) -> dict[str, Any]:
    """Run a command to its end, its words into `log`; the last line of its stdout as JSON, {} where it is none.

    TrainingError with its last words when it fails. It ends with this process, however that goes.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as words:
        child = subprocess.Popen(  # noqa: S603  our own modules
            command,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            preexec_fn=_end_with_parent,
            env=os.environ | {"COLUMNS": "200"},
        )
        try:
            out, _ = child.communicate()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    said = log.read_text(encoding="utf-8")
    log.write_text(said + out, encoding="utf-8")
    if child.returncode:
        last = " ".join((said.strip() or out.strip()).splitlines()[-3:])
        raise TrainingError(f"{' '.join(command[2:4])} ended with {child.returncode}: {last} (all of it: {log})")
    return _last_json(out)


def _last_json(text: str) -> dict[str, Any]:
    lines = text.strip().splitlines()
    try:
        value = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _end_with_parent() -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
