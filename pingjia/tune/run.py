"""The whole training job: check data, load, adapt, train, save, account. What `pingjia train` and the studio call."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import pingjia
from pingjia import chat, data
from pingjia.data.settings import DataSettings
from pingjia.errors import TrainingError
from pingjia.ledger import Ledger
from pingjia.meter import Meter
from pingjia.models import base_fingerprint, family_of, load_model, max_model_len, use_packed_attention
from pingjia.models.device import pick_device
from pingjia.models.family import Family
from pingjia.models.packing import pick_packing, stored_bits
from pingjia.models.settings import ModelSettings
from pingjia.tune import continual
from pingjia.tune.account import Account
from pingjia.tune.checkpoint import (
    ABOUT_FILE,
    LOG_FILE,
    checkpoints,
    require_room,
    result_files,
    run_fingerprint,
    save_adapter,
    set_aside,
    step_of,
)
from pingjia.tune.directory import Proof, save_directory
from pingjia.tune.distributed import Alone, Holding, joined, local_rank
from pingjia.tune.fused import fuse
from pingjia.tune.gate import Examine
from pingjia.tune.journal import StepLog, read_log
from pingjia.tune.keep import Finish, Kept
from pingjia.tune.lineage import stages_of
from pingjia.tune.loop import SHRUNK, Run, run_training
from pingjia.tune.lora import Targets, adaptable, num_layers, resolve, resolve_targets
from pingjia.tune.phases import Phase, plan_phases
from pingjia.tune.pissa import first_matrices
from pingjia.tune.plan import TrainPlan, plan_of
from pingjia.tune.plot import plot_loss
from pingjia.tune.precision import base_dtype
from pingjia.tune.relief import checkpoint_activations
from pingjia.tune.rows import encode_rows
from pingjia.tune.settings import FREEZE_KEYS, PhaseSettings, TuneSettings
from pingjia.tune.trackers import Tracked, Trackers, run_key, wanted
from pingjia.tune.trained import trained_of
from pingjia.tune.weights import modules_of_phase, open_weights, require_trainable, resolve_weights
from pingjia.types import Encoded

_NOT_WEIGHTS = {
    "output_dir",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "memory",
    "memory_limit_gb",
    "activation_cache_gb",
    "report_to",
    "distributed",
    "continue_from",  # what a course takes from there counts, not where it is
    "continual",
}


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to. `seconds` are those of all its updates, over every call that worked on it.

    `stored_bytes`: of its adapter, or of the model directory that it left.
    """

    output_dir: Path
    finished: bool
    was_finished: bool  # an earlier call had done it all
    stored_bytes: int
    num_steps: int
    last_loss: float
    eval_loss: float | None
    seconds: float
    trained_tokens: int
    learnt_tokens: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Hooks:
    """How a surface (terminal, page) follows a run. `should_stop` is asked after every update.

    `examine` asks the questions of probes; without it they are judged by their loss alone.
    """

    on_plan: Callable[[TrainPlan], None] = lambda plan: None
    on_step: Callable[[StepLog], None] = lambda log: None
    on_shared_out: Callable[[Sequence[Holding]], None] = lambda holdings: None
    on_warning: Callable[[str], None] = lambda text: None
    should_stop: Callable[[], bool] = lambda: False
    on_retention: Callable[[Kept], None] = lambda kept: None
    examine: Examine | None = None


def train(
    model_settings: ModelSettings,
    data_settings: DataSettings,
    settings: TuneSettings,
    *,
    ledger: Ledger | None = None,
    run_name: str = "",
    hooks: Hooks = Hooks(),
) -> TrainResult:
    """Train an adapter, or the network itself, into `settings.output_dir`; goes on where an interrupted run with equal
    inputs stopped.

    Raises DataError (nothing to learn), ModelError, TrainingError (it would train nothing, or diverged), StorageError;
    RetentionError when earlier tasks would be forgotten: the adapter is then in candidate/.
    """
    output_dir = Path(settings.output_dir)
    _require_apart(output_dir, model_settings.model_name_or_path)
    output_dir.mkdir(parents=True, exist_ok=True)
    device = pick_device(model_settings.device, index=local_rank())
    with joined(settings, device) as ranks, _only_run_in(output_dir, ranks), Meter() as meter:
        inputs = read_inputs(model_settings, data_settings, settings, device)
        finished = ranks.from_first(lambda: _finished(output_dir, inputs.fingerprint, inputs.settings))
        if finished is not None:
            return finished
        job = build(inputs, ranks, hooks)
        account = Account(job.run, meter, ledger if ranks.is_first else None, run_name)
        job.run.on_saved = account.note
        plan = plan_of(job.run, job.targets, inputs.dropped)
        if ranks.is_first:
            if not inputs.is_adapter:
                require_room(output_dir, _disk_bytes(job.run))
            job.run.on_shared_out = hooks.on_shared_out
            if settings.resume_from_checkpoint is False:
                set_aside(output_dir)
            hooks.on_plan(plan)
        tracked = _tracked(job.run, run_name, {**inputs.recipe, "num_trainable": plan.num_trainable})
        names = wanted(settings.report_to) if ranks.is_first else []
        with Trackers(names, tracked, hooks.on_warning) as trackers:
            job.run.observe = _observers(hooks, trackers)
            completed = run_training(job.run)
        size, kept = _keep(inputs, job, hooks) if completed else (0, None)
        if ranks.is_first:
            plot_loss(job.run.logs, output_dir / "training_loss.png")
        account.note(size)
        if kept is not None:
            hooks.on_retention(kept)
            if kept.refused is not None:
                raise kept.refused
        return TrainResult(output_dir, completed, False, size, **_metrics(job.run))


@dataclass(frozen=True)
class Inputs:
    """Everything that decides a run, read and checked; `settings` as its course (continual learning) leaves them."""

    model_settings: ModelSettings
    data_settings: DataSettings
    settings: TuneSettings
    tokenizer: chat.Tokenizer
    model: PreTrainedModel
    family: Family
    base: str
    course: continual.Course
    rows: list[Encoded]
    eval_rows: list[Encoded]
    dropped: list[str]
    has_tools: bool

    @cached_property
    def all_rows(self) -> list[Encoded]:
        """The rows of the task, and those that are replayed."""
        return [*self.rows, *self.course.replay]

    @property
    def is_adapter(self) -> bool:
        return self.settings.finetuning_type == "lora"

    @property
    def is_freeze(self) -> bool:
        return self.settings.finetuning_type == "freeze"

    @cached_property
    def golden(self) -> list[dict[str, Any]]:
        """Chats that show later whether this tokenizer is at hand; with a call of a tool where rows have tools."""
        return chat.golden_chats(self.tokenizer, with_tools=self.has_tools)

    @property
    def recipe(self) -> dict[str, Any]:
        return _recipe(self.model_settings, self.data_settings, self.settings)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for runs that come to the same weights."""
        return run_fingerprint(
            {
                "rows": [(row.ids, row.learn, *([row.weight] if row.weight != 1 else [])) for row in self.all_rows],
                "base": self.base,
                "numbers": [str(self.model.dtype), stored_bits(self.model)],
                "tune": self.settings.model_dump(exclude=_NOT_WEIGHTS | (set() if self.is_freeze else FREEZE_KEYS)),
                "template": self.tokenizer.template_digest,
                **self.course.inputs,
            }
        )


def read_inputs(
    model_settings: ModelSettings, data_settings: DataSettings, settings: TuneSettings, device: torch.device
) -> Inputs:
    """Load and check all that a run needs. Raises DataError, ModelError, TrainingError."""
    tokenizer = chat.load_tokenizer(model_settings.model_name_or_path)
    is_adapter = settings.finetuning_type == "lora"
    model = load_model(
        model_settings.model_name_or_path,
        dtype=base_dtype(model_settings.dtype, settings, device),
        device=device,
        bits=pick_packing(model_settings, device),
    )
    if not is_adapter:
        require_trainable(model, settings)
    cutoff_len = min(data_settings.cutoff_len, max_model_len(model.config))
    rows = encode_rows(data_settings.dataset, data_settings, tokenizer, cutoff_len)
    held_out = data_settings.eval_dataset
    eval_rows = encode_rows(held_out, data_settings, tokenizer, cutoff_len).encoded if held_out else []
    base = base_fingerprint(model)
    course = continual.begin(settings, data_settings, continual.Reader(tokenizer, cutoff_len), base)
    return Inputs(
        model_settings=model_settings,
        data_settings=data_settings,
        settings=course.settings,
        tokenizer=tokenizer,
        model=model,
        family=family_of(model),
        base=base,
        course=course,
        rows=rows.encoded,
        eval_rows=eval_rows,
        dropped=rows.dropped,
        has_tools=rows.has_tools,
    )


@dataclass(frozen=True, slots=True)
class Built:
    """The network, ready to be trained. `first`: what a PiSSA began with; `finish`: of a course; `proof`: of a network
    without an adapter."""

    run: Run
    targets: Targets
    first: Mapping[str, torch.Tensor]
    finish: Finish | None
    proof: Proof | None


def build(inputs: Inputs, ranks: Alone, hooks: Hooks) -> Built:
    """Put on the adapter, or open the weights, and make the run. Raises TrainingError when nothing would learn."""
    settings, course, family = inputs.settings, inputs.course, inputs.family
    output_dir = Path(settings.output_dir)
    resume_from = ranks.from_first(lambda: _resume_from(output_dir, settings))
    targets = _targets(inputs)
    phases = _phases(inputs)
    depth = num_layers(adaptable(inputs.model))
    use_packed_attention(inputs.model)
    proof = None if inputs.is_adapter else Proof(inputs.model, family, [golden["ids"] for golden in inputs.golden])
    model = course.adapt(inputs.model, targets) if inputs.is_adapter else open_weights(inputs.model, targets)
    if settings.distributed.strategy != "zero3":  # DeepSpeed gathers a linear's weights when that linear is called
        fuse(model)
    first = first_matrices(model) if inputs.is_adapter else {}
    terms = course.terms(model, family, output_dir, inputs.fingerprint)
    finish = None if course.is_plain else Finish(course, model, family, inputs.rows, first)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    run = Run(
        model=model,
        trained=trained_of(model),
        family=family,
        rows=inputs.all_rows,
        eval_rows=inputs.eval_rows,
        settings=settings,
        phases=course.phases(phases, len(inputs.rows)),
        num_layers=depth,
        fingerprint=inputs.fingerprint,
        output_dir=output_dir,
        ranks=ranks,
        resume_from=resume_from,
        should_stop=hooks.should_stop,
        terms=terms,
    )
    return Built(run, targets, first, finish, proof)


def _targets(inputs: Inputs) -> Targets:
    """What learns: the modules that get an adapter, or whose own weights are opened."""
    if not inputs.is_adapter:
        return resolve_weights(inputs.model, inputs.family, inputs.settings)
    return inputs.course.targets(resolve_targets(inputs.model, inputs.family, inputs.settings))


def _phases(inputs: Inputs) -> list[Phase]:
    model, family, settings = inputs.model, inputs.family, inputs.settings

    def modules_of(phase: PhaseSettings) -> tuple[str, ...]:
        if not inputs.is_adapter:
            return modules_of_phase(model, family, phase)
        return resolve(model, family, phase.target, phase.layers or settings.lora_layers).modules

    return plan_phases(inputs.course.rows_per_epoch(len(inputs.rows)), settings, modules_of)


def _keep(inputs: Inputs, job: Built, hooks: Hooks) -> tuple[int, Kept | None]:
    """Write the finished adapter or model: (its bytes, what a course says of it)."""
    run, about = job.run, _about(inputs, job.run)
    if job.finish is not None:
        kept = job.finish.keep(run.output_dir, about, hooks.examine)
        return kept.adapter_bytes, kept
    with run.ranks.whole(run.model):
        if not run.ranks.is_first:
            return 0, None
        if job.proof is None:
            return save_adapter(run.output_dir, run.model, about, job.first), None
        run.model.zero_grad(set_to_none=True)
        check = partial(job.proof.check, model=run.model, is_whole=not run.ranks.is_cut)
        return save_directory(run.output_dir, run.model, inputs.tokenizer, about, check), None


def _about(inputs: Inputs, run: Run) -> dict[str, Any]:
    """pingjia.json: what the result was made from, and what it must be served with."""
    model, tokenizer = inputs.model_settings.model_name_or_path, inputs.tokenizer
    return {
        "format": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "pingjia_version": pingjia.__version__,
        "finetuning_type": inputs.settings.finetuning_type,
        "base": {"name": model, "fingerprint": inputs.base, "family": inputs.family.name},
        "chat": {"template_digest": tokenizer.template_digest, "golden": inputs.golden},
        "data": {
            "files": [*inputs.data_settings.dataset],
            "fingerprint": data.fingerprint(inputs.data_settings.dataset),
            "num_rows": len(inputs.rows),
        },
        "recipe": inputs.recipe,
        "run_fingerprint": inputs.fingerprint,
        "metrics": _metrics(run),
        **({} if inputs.is_adapter else _ancestry(model)),
    }


def _ancestry(model: str) -> dict[str, Any]:
    """The runs that made the base, where it is itself a model directory that a run left."""
    about = read_about(Path(model))
    return {"lineage": [asdict(stage) for stage in stages_of(Path(model), about)]} if about is not None else {}


def _recipe(*sections: Any) -> dict[str, Any]:
    return {key: value for section in sections for key, value in section.model_dump(mode="json").items()}


def _tracked(run: Run, name: str, hyperparameters: Mapping[str, Any]) -> Tracked:
    folder, start = run.output_dir, step_of(run.resume_from)
    key = run_key(folder, goes_on=start > 0) if run.ranks.is_first else ""
    return Tracked(folder, name or folder.name, key, hyperparameters, start)


def _observers(hooks: Hooks, trackers: Trackers) -> Callable[[StepLog], None]:
    def observe(log: StepLog) -> None:
        trackers.log(log.step, _numbers(log))
        hooks.on_step(log)

    return observe


def _numbers(log: StepLog) -> dict[str, float | None]:
    """What trackers draw, by their names there."""
    return {
        "loss/train": log.loss,
        "loss/held_out": log.eval_loss,
        "loss/l2": log.l2,
        "loss/orthogonality": log.orthogonality,
        "loss/ewc": log.ewc,
        "gradient_norm": log.grad_norm,
        **{f"rate/{group}": rate for group, rate in log.rates.items()},
        "speed/tokens_per_s": log.num_tokens / log.seconds,
        "speed/learnt_tokens_per_s": log.num_learnt / log.seconds,
        "memory/peak_gb": log.peak_bytes / 1e9,
        "epoch": log.epoch,
    }


def _require_apart(output_dir: Path, model: str) -> None:
    """What a run writes must not be taken for its base, nor push it aside."""
    if output_dir.is_dir() and Path(model).is_dir() and output_dir.samefile(model):
        raise TrainingError(
            f"output_dir {output_dir} is the model that is trained; choose another output_dir: this one must stay as "
            "it is, for the run to go on from"
        )


@contextmanager
def _only_run_in(output_dir: Path, ranks: Alone) -> Iterator[None]:
    """Two runs in one directory would overwrite each other's checkpoints. One process watches for all."""
    if not ranks.is_first:
        yield
        return
    with open(output_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TrainingError(
                f"another run is writing to {output_dir}; wait for it or choose another output_dir"
            ) from None
        yield


def _finished(output_dir: Path, fingerprint: str, settings: TuneSettings) -> TrainResult | None:
    about = read_about(output_dir)
    if about is None or settings.resume_from_checkpoint is False:
        return None
    if about.get("run_fingerprint") != fingerprint:
        raise TrainingError(
            f"{output_dir} holds a finished {_kind(about)} of a run with other data, base model or settings; choose "
            "another output_dir, or resume_from_checkpoint=false to replace it"
        )
    return TrainResult(output_dir, True, True, _stored_bytes(output_dir), **about["metrics"])


def _kind(about: Mapping[str, Any]) -> str:
    return "adapter" if about.get("finetuning_type", "lora") == "lora" else "model"


def result_so_far(settings: TuneSettings, *, finished: bool) -> TrainResult:
    """What other processes made of a run, read from its files."""
    output_dir = Path(settings.output_dir)
    about = read_about(output_dir) if finished else None
    if about is not None:
        return TrainResult(output_dir, True, False, _stored_bytes(output_dir), **about["metrics"])
    logs = read_log(output_dir / LOG_FILE)
    return TrainResult(
        output_dir=output_dir,
        finished=finished,  # on the machine of the first process, where this one is not
        was_finished=False,
        stored_bytes=0,
        num_steps=logs[-1].step if logs else 0,
        last_loss=logs[-1].loss if logs else math.nan,
        eval_loss=None,
        seconds=sum(log.seconds for log in logs),
        trained_tokens=sum(log.num_tokens for log in logs),
        learnt_tokens=sum(log.num_learnt for log in logs),
        peak_bytes=max((log.peak_bytes for log in logs), default=0),
    )


def _disk_bytes(run: Run) -> int:
    """What a run that keeps weights of the network writes at most: a checkpoint is whole before an old one goes."""
    kept = (run.settings.save_total_limit + 1) * run.trained.checkpoint_bytes
    best = (run.settings.save_total_limit + 2) * run.trained.weight_bytes if run.wants_best else 0
    return kept + best + sum(p.numel() * p.element_size() for p in run.model.parameters())


def read_about(output_dir: Path) -> Mapping[str, Any] | None:
    """pingjia.json of what a finished run left, or None."""
    try:
        about: Mapping[str, Any] = json.loads((output_dir / ABOUT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about


def _stored_bytes(output_dir: Path) -> int:
    return sum(file.stat().st_size for file in result_files(output_dir))


def _resume_from(output_dir: Path, settings: TuneSettings) -> Path | None:
    """The checkpoint to go on from, or None to start at the first update."""
    if isinstance(settings.resume_from_checkpoint, str):
        return Path(settings.resume_from_checkpoint)
    found = checkpoints(output_dir)
    return found[-1].path if found and settings.resume_from_checkpoint else None


def _metrics(run: Run) -> dict[str, Any]:
    last = run.logs[-1]
    return {
        "num_steps": last.step,
        "last_loss": last.loss,
        "eval_loss": _eval_loss(run),
        "seconds": round(sum(log.seconds for log in run.logs), 3),
        "trained_tokens": sum(log.num_tokens for log in run.logs),
        "learnt_tokens": sum(log.num_learnt for log in run.logs),
        "peak_bytes": run.peak_bytes,
    }


def _eval_loss(run: Run) -> float | None:
    """Held-out loss of the weights that are kept: the best since the phase began or the rank shrank, or the last."""
    losses: list[float] = []
    for log in reversed(run.logs):
        if log.phase != run.logs[-1].phase or (log.event or "").startswith(SHRUNK):
            break
        if log.eval_loss is not None:
            losses.append(log.eval_loss)
    if not losses:
        return None
    return min(losses) if run.wants_best else losses[0]
