"""The order of a run: which update comes next, when to look, log, save and stop. Arithmetic is in step.py.

A run is a row of phases (mostly one). Where it stands is `Progress`, which goes into every checkpoint.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from pingjia.errors import TrainingError
from pingjia.meter import peak_bytes
from pingjia.models.device import rng_state, set_rng_state
from pingjia.models.family import Family
from pingjia.tune import checkpoint as disk
from pingjia.tune.batches import MAX_TOKENS_ON_CPU, BatchPlan, longest_micro, share_of_process
from pingjia.tune.checkpoint import LOG_FILE, Saved
from pingjia.tune.distributed import Alone, Holding
from pingjia.tune.frozen import FrozenLayers, Model, num_frozen_layers
from pingjia.tune.groups import RateGroup, Rates, group_parameters, optimizer_groups
from pingjia.tune.guards import MOVED_AFTER_STEPS, LastUpdate, MovedCheck, require_in_optimizer
from pingjia.tune.journal import StepLog, as_line, as_text, restore_log, write_log
from pingjia.tune.ladder import Rung
from pingjia.tune.penalty import Penalties, l2_penalty, lora_matrices
from pingjia.tune.phases import Phase, enter, frozen_digest, require_untouched, trainable_names
from pingjia.tune.relief import Memory
from pingjia.tune.schedule import rate_factor
from pingjia.tune.settings import TuneSettings
from pingjia.tune.shrink import shrink_rank
from pingjia.tune.step import MicroBatch, Penalty, StepResult, build_batch, mean_loss, rehearse_update, update
from pingjia.tune.trained import Trained
from pingjia.tune.watch import Watch
from pingjia.types import Encoded

T = TypeVar("T")
_SEED_STRIDE = 1_000_003  # between the seeds of processes; no one chooses seeds so far apart
SHRUNK = "over-fitting"  # how the event begins that makes the adapter smaller


@dataclass(slots=True)
class Progress:
    """Where a run stands. `phase_start`: updates made when the phase began; `rank`: the adapter's now; `rung`: how much
    memory it makes do with; `event`: what happened since the last update, for its line of the log."""

    rank: int
    rung: Rung
    step: int = 0
    phase: int = 0
    phase_start: int = 0
    watch: Watch = field(default_factory=Watch)
    event: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Progress:
        return cls(**{**value, "watch": Watch.of(value["watch"]), "rung": Rung(**value["rung"])})


@dataclass(slots=True)
class Run:
    """Everything one training run needs, and what it has done so far. `trained`: what of `model` is kept."""

    model: Model
    trained: Trained
    family: Family
    rows: Sequence[Encoded]
    eval_rows: Sequence[Encoded]
    settings: TuneSettings
    phases: Sequence[Phase]
    num_layers: int
    fingerprint: str
    output_dir: Path
    ranks: Alone
    resume_from: Path | None = None
    observe: Callable[[StepLog], None] = lambda log: None
    should_stop: Callable[[], bool] = lambda: False
    on_saved: Callable[[], None] = lambda: None
    on_shared_out: Callable[[Sequence[Holding]], None] = lambda holdings: None
    terms: Mapping[str, Penalty] = field(default_factory=dict)  # of the loss besides L2, by their name in the log
    start: int = 0  # updates that the checkpoint it goes on from had made
    logs: list[StepLog] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def num_steps(self) -> int:
        """Updates of all phases, if none ends early."""
        return sum(phase.plan.num_steps for phase in self.phases)

    @property
    def wants_best(self) -> bool:
        """Whether the best weights are kept and put back."""
        return bool(self.eval_rows) and (
            self.settings.early_stopping_patience is not None or self.settings.shrink_lora_rank_to is not None
        )


def rate_groups(run: Run, phase: Phase, trainable: frozenset[str]) -> list[RateGroup]:
    """Open what the phase trains and share it out by rate."""
    s = run.settings
    rates = Rates(phase.learning_rate, s.layer_learning_rates, s.loraplus_lr_ratio)
    return group_parameters(enter(run.model, phase, trainable), rates, run.num_layers)


def run_training(run: Run) -> bool:
    """Make every update that is left. True when complete, False when `should_stop` ended it (it is saved then)."""
    ranks, trainable = run.ranks, trainable_names(run.model)
    saved = ranks.from_first(partial(_read_saved, run))
    first_rung = Rung(run.settings.per_device_train_batch_size, run.settings.gradient_checkpointing)
    progress = Progress.of(saved.progress) if saved else Progress(run.settings.lora_rank, first_rung)
    adapts_memory = run.settings.memory == "auto" and ranks.has_ladder
    memory = Memory(run.model, first_rung, run.settings, ranks) if adapts_memory else None
    if memory:
        memory.go_to(progress.rung)
    if saved:
        _restore_weights(run, progress, saved)
        saved = replace(saved, tensors={})
    run.start = progress.step
    run.logs = ranks.from_first(partial(restore_log, run.resume_from))
    if ranks.is_first:
        write_log(run.output_dir / LOG_FILE, as_text(run.logs), "w")
    model = ranks.prepare(run.model)
    if ranks.rank and saved is None:
        torch.manual_seed(run.settings.seed + _SEED_STRIDE * ranks.rank)  # or all would draw the same dropout
    while progress.phase < len(run.phases):
        work = _Phase(run, model, progress, trainable, memory)
        work.open(saved)
        saved = None
        if not work.train():
            return False
    return True


@dataclass(frozen=True, slots=True)
class Trial:
    """What the longest micro-batch of a run took. `event`: what the run did to make do with its memory. `typical`: some
    of its updates as they are, spread over its first epoch."""

    result: StepResult
    rung: Rung
    event: str | None
    typical: tuple[StepResult, ...] = ()


def try_run(run: Run, *, num_typical: int = 0) -> Trial:
    """The beginning of `run_training` on its longest micro-batch: two updates, the second one is measured; then so many
    updates as the plan has them.

    In one process; writes no checkpoint. Raises what the run itself would raise.
    """
    trainable = trainable_names(run.model)
    rung = Rung(run.settings.per_device_train_batch_size, run.settings.gradient_checkpointing)
    memory = Memory(run.model, rung, run.settings, run.ranks) if run.settings.memory == "auto" else None
    work = _Phase(run, run.model, Progress(run.settings.lora_rank, rung), trainable, memory)
    work.open(None)
    return work.try_updates(2, num_typical)


def _read_saved(run: Run) -> Saved | None:
    if run.resume_from is None:
        return None
    return disk.read_checkpoint(run.resume_from, run.trained.file, fingerprint=run.fingerprint)


def _restore_weights(run: Run, progress: Progress, saved: Saved) -> None:
    if progress.rank != run.settings.lora_rank:
        shrink_rank(run.model, progress.rank)
    run.trained.load(saved.tensors, saved.path)


class _Phase:
    """One phase of a run at work."""

    def __init__(
        self,
        run: Run,
        model: Any,
        progress: Progress,
        trainable: frozenset[str],
        memory: Memory | None,
    ) -> None:
        self.run, self.progress, self._memory = run, progress, memory
        self.phase = run.phases[progress.phase]
        self._model, self._trainable = model, trainable
        self._since_look: list[float] = []  # training losses since the last look at the held-out rows
        self._optimizer: Any = None
        self._penalty: Penalties | None = None
        self._frozen = ""
        self._below: FrozenLayers | None = None
        self._lengths = [len(row.ids) for row in run.rows]

    def open(self, saved: Saved | None) -> None:
        """Make parameters, optimizer and random state those of the phase's beginning, or of the checkpoint."""
        self._build_optimizer()
        if self.progress.step == self.run.start:
            self.run.on_shared_out(self.run.ranks.holdings(self.run.model))
        if len(self.run.phases) > 1:
            self._frozen = frozen_digest(self.run.model)
        self._eval_batches = _batches(self.run, self.run.eval_rows)
        first = self._first()
        with self.run.ranks.whole(self.run.model):
            self._has_moved = MovedCheck(self.run.model, self.run.trained.what) if first < MOVED_AFTER_STEPS else None
        if saved is not None:
            disk.restore_optimizer(saved, self._optimizer, self.run.ranks.rank)
            self._since_look = self._losses_since_look()
        self._model.train()
        if self._memory:
            self._try_longest()

    def _build_optimizer(self) -> None:
        s, groups = self.run.settings, rate_groups(self.run, self.phase, self._trainable)
        held = optimizer_groups(groups, s.weight_decay)
        require_in_optimizer(self.run.model, held)
        self._optimizer = self.run.ranks.optimizer(self._model, held, s.weight_decay)
        matrices = lora_matrices(self.run.model.named_parameters())
        terms = dict(self.run.terms)
        if s.lora_l2 and matrices:
            terms["l2"] = partial(l2_penalty, matrices, s.lora_l2)
        self._penalty = Penalties(terms) if terms else None
        self._below = frozen_layers(self.run)

    def _first(self) -> int:
        return self.progress.step - self.progress.phase_start

    def _losses_since_look(self) -> list[float]:
        losses: list[float] = []
        for log in self.run.logs[self.progress.phase_start :]:
            losses = [] if log.eval_loss is not None else [*losses, log.loss]
        return losses

    def train(self) -> bool:
        """Every update that is left in the phase. False when `should_stop` ended it."""
        run, plan, first = self.run, self.phase.plan, self._first()
        for step, micros in plan.updates(first):
            rate, result = self._update(step, [row for micro in micros for row in micro])
            self.progress.step += 1
            done, last = step + 1, step + 1 == plan.num_steps
            self._since_look.append(result.loss)
            if self._has_moved and done == min(first + MOVED_AFTER_STEPS, plan.num_steps) and done > 1:
                with run.ranks.whole(run.model):
                    self._has_moved(run.model, self._last_update(done, rate, result))
                self._has_moved = None
            eval_loss = self._look() if self._is_time_to_look(done, last) else None
            decided, is_over = self._decide(eval_loss)
            event = "; ".join(filter(None, (self.progress.event, result.event, decided))) or None
            self.progress.event = None
            self._log(done, rate, result, eval_loss, event)
            last = last or is_over
            stopping = run.ranks.any(run.should_stop()) and not last
            if last:
                self._close()
            if stopping or last or done % run.settings.save_steps == 0:
                self._save(between_phases=last)
            if stopping:
                return False
            if last:
                return True
        self._close()
        return True

    def _last_update(self, number: int, rate: float, result: StepResult) -> LastUpdate:
        run = self.run
        seen = any(p.grad is not None for p in run.model.parameters())
        earlier = [log.learning_rate for log in run.logs[-MOVED_AFTER_STEPS:]]
        return LastUpdate(number, (*earlier, rate), result.grad_norm, run.settings.max_grad_norm, seen)

    def _update(self, step: int, rows: list[int]) -> tuple[float, StepResult]:
        s, started = self.run.settings, time.perf_counter()
        factor = rate_factor(step, self.phase.plan.num_steps, kind=s.lr_scheduler_type, warmup_ratio=s.warmup_ratio)

        def attempt() -> StepResult:
            ranks = self.run.ranks
            return update(
                ranks,
                self._model,
                self._optimizer,
                ranks.attempt(partial(self._micro_batches, rows)),  # frozen layers compute in it
                rate_factor=factor,
                max_grad_norm=s.max_grad_norm,
                penalty=self._penalty,
                before_each=self._memory.check if self._memory else None,
            )

        result = self._with_less_if_needed(attempt)
        rate = factor * max(group["peak"] for group in self._optimizer.param_groups)
        return rate, replace(result, seconds=time.perf_counter() - started)

    def try_updates(self, count: int, num_typical: int = 0) -> Trial:
        """Updates on the longest micro-batch, at a rate from the middle of the schedule. Weights do move."""
        progress, plan = self.progress, self.phase.plan
        numbers = longest_micro(
            plan, self._lengths, progress.rung.rows_per_micro, max_tokens=max_micro_tokens(self.run)
        )
        results = [self._update(plan.num_steps // 2, numbers)[1] for _ in range(count)]
        typical = tuple(self._update(*chosen)[1] for chosen in _spread_updates(plan, num_typical))
        return Trial(results[-1], progress.rung, progress.event, typical)

    def _micro_batches(self, rows: list[int]) -> list[MicroBatch]:
        """What this process computes of an update."""
        ranks, size = self.run.ranks, self.progress.rung.rows_per_micro
        micros = share_of_process(rows, self._lengths, size, ranks.rank, ranks.size, max_micro_tokens(self.run))
        return [replace(self._batch(micro), is_idle=is_idle) for micro, is_idle in micros]

    def _batch(self, numbers: list[int]) -> MicroBatch:
        run = self.run
        rows = [run.rows[number] for number in numbers]
        batch = build_batch(rows, run.family, run.model.config, run.model.device)
        return replace(batch, entering=self._below.entering(numbers, rows)) if self._below else batch

    def _try_longest(self) -> None:
        """Forward and backward of the longest micro-batch that will come, to know now whether it fits."""
        before = rng_state()

        def attempt() -> None:
            rung, first, ranks = self.progress.rung, self._first(), self.run.ranks
            most = max_micro_tokens(self.run)
            numbers = longest_micro(self.phase.plan, self._lengths, rung.rows_per_micro, first, ranks.size, most)
            if numbers:
                ranks.attempt(lambda: rehearse_update(ranks, self._model, self._optimizer, self._batch(numbers)))

        self._with_less_if_needed(attempt)
        set_rng_state(before)

    def _with_less_if_needed(self, attempt: Callable[[], T]) -> T:
        """Do it; where memory runs out, go down a rung and do it again with the same weights and random numbers."""
        before = rng_state()
        while True:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as e:
                if not self.run.ranks.is_out_of_memory(e):
                    raise
                reason = str(e).splitlines()[0]
            if self._memory is None:
                raise TrainingError(
                    f"out of memory ({reason}). memory=auto makes do with less of it by itself; or halve "
                    "per_device_train_batch_size and double gradient_accumulation_steps"
                )
            # Outside of `except`: the error holds on to everything that the failed attempt had made.
            self._optimizer.zero_grad()
            self.run.ranks.recover(self._model)
            set_rng_state(before)
            self._step_down(self._memory, reason)

    def _step_down(self, memory: Memory, reason: str) -> None:
        progress = self.progress
        self._below = None
        event = memory.step_down(self.phase.plan.rows_per_update, reason)
        progress.rung, progress.event = memory.rung, "; ".join(filter(None, (progress.event, event)))
        self._below = frozen_layers(self.run)
        if self._frozen:
            self._frozen = frozen_digest(self.run.model)
        if progress.step:
            self._save(between_phases=False)

    def _is_time_to_look(self, done: int, last: bool) -> bool:
        if not self._eval_batches:
            return False
        every = self.run.settings.eval_steps or self.phase.plan.updates_per_epoch
        return last or done % every == 0

    def _look(self) -> float:
        return mean_loss(self._model, self._eval_batches, self.run.ranks)

    def _decide(self, eval_loss: float | None) -> tuple[str | None, bool]:
        """(what happened, whether the phase is over), after a look."""
        run, progress, watch = self.run, self.progress, self.progress.watch
        if eval_loss is None:
            return None, False
        train_loss = sum(self._since_look) / len(self._since_look)
        self._since_look = []
        is_best = watch.look(progress.step, eval_loss, train_loss)
        if not run.wants_best:
            return None, False
        if is_best:
            with run.ranks.whole(run.model):
                if run.ranks.is_first:
                    disk.save_best(run.output_dir, progress.step, run.trained)
            return None, False
        smaller = run.settings.shrink_lora_rank_to
        if smaller is not None and progress.rank > smaller and watch.is_overfitting():
            return self._shrink(smaller), False
        if watch.should_stop(run.settings.early_stopping_patience):
            return f"stopped early: no better held-out loss at {watch.num_worse} looks in a row", True
        return None, False

    def _shrink(self, rank: int) -> str:
        """Back to the best weights, cut to a lower rank; the optimizer begins anew."""
        run, progress, watch = self.run, self.progress, self.progress.watch
        assert watch.best_loss is not None
        before, best_step, best_loss = progress.rank, watch.best_step, watch.best_loss
        gaps = ", ".join(f"{gap:.3f}" for gap in watch.gaps)
        self._load_best(best_step)
        lost = shrink_rank(run.model, rank)
        progress.rank = rank
        progress.watch = Watch()
        self._build_optimizer()
        if self._frozen:
            self._frozen = frozen_digest(run.model)
        return (
            f"{SHRUNK} (held-out loss minus training loss {gaps}): rank {before} -> {rank} from the weights of update "
            f"{best_step} (held-out loss {best_loss:.4f}); {lost:.1%} of the adapter's squared norm left out"
        )

    def _close(self) -> None:
        """Put the best weights back, see that what was frozen has not moved, and make ready for the next phase."""
        run, progress, watch = self.run, self.progress, self.progress.watch
        if run.wants_best and watch.best_loss is not None and watch.best_step != progress.step:
            self._load_best(watch.best_step)
        if self._frozen:
            require_untouched(run.model, self._frozen, self.phase)
        progress.phase += 1
        if progress.phase < len(run.phases):
            progress.phase_start = progress.step
            progress.watch = Watch()

    def _load_best(self, step: int) -> None:
        run = self.run
        tensors = run.ranks.from_first(lambda: disk.load_best(run.output_dir, step, run.trained.file))
        with run.ranks.whole(run.model):
            run.trained.load(tensors, run.output_dir)

    def _save(self, *, between_phases: bool) -> None:
        run = self.run
        rng = run.ranks.gather(rng_state())
        optimizer = None if between_phases else self._optimizer.state_dict()
        with run.ranks.whole(run.model):
            if run.ranks.is_first:
                self._write(optimizer, rng)

    def _write(self, optimizer: Mapping[str, Any] | None, rng: Sequence[Mapping[str, Any]]) -> None:
        run, progress = self.run, self.progress
        disk.save_checkpoint(
            run.output_dir,
            progress.to_dict(),
            run.trained,
            optimizer,
            rng,
            fingerprint=run.fingerprint,
            log=as_text(run.logs),
            keep=run.settings.save_total_limit,
        )
        disk.prune_best(run.output_dir, progress.watch.best_step)
        run.on_saved()

    def _log(self, done: int, rate: float, result: StepResult, eval_loss: float | None, event: str | None) -> None:
        run = self.run
        log = StepLog(
            step=self.progress.step,
            num_steps=run.num_steps,
            epoch=round(done / self.phase.plan.updates_per_epoch, 4),
            loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            num_tokens=result.num_tokens,
            num_learnt=result.num_learnt,
            seconds=round(result.seconds, 4),
            eval_loss=eval_loss,
            phase=self.phase.name if len(run.phases) > 1 else None,
            event=event,
            **(self._penalty.last if self._penalty else {}),
            rates=_rates_by_group(self._optimizer.param_groups),
            peak_bytes=max(run.peak_bytes, peak_bytes()),
        )
        run.logs.append(log)
        run.peak_bytes = log.peak_bytes
        if run.ranks.is_first:
            write_log(run.output_dir / LOG_FILE, as_line(log), "a")
            run.observe(log)


def _spread_updates(plan: BatchPlan, count: int) -> list[tuple[int, list[int]]]:
    """At most so many updates of the first epoch, evenly over it: (number, rows)."""
    if not count:
        return []
    first = itertools.islice(plan.updates(0), min(plan.num_steps, plan.updates_per_epoch))
    updates = [(step, [row for micro in micros for row in micro]) for step, micros in first]
    num = min(count, len(updates))
    return [updates[i * len(updates) // num] for i in range(num)]


def frozen_layers(run: Run) -> FrozenLayers | None:
    """What takes rows through the layers below all that learns now; None when the first layer learns."""
    if run.ranks.is_cut:  # weights are gathered by the network's own forward pass, which this goes around
        return None
    count = num_frozen_layers(run.model)
    budget = int(run.settings.activation_cache_gb * 1e9)
    return FrozenLayers(run.model, run.family, count, budget) if count else None


def max_micro_tokens(run: Run) -> int | None:
    """Tokens a micro-batch is to have at most; None where a longer one is computed faster, or costs fewer messages."""
    return MAX_TOKENS_ON_CPU if run.ranks.size == 1 and run.model.device.type == "cpu" else None


def _batches(run: Run, rows: Sequence[Encoded]) -> list[MicroBatch]:
    """This process's part of held-out rows."""
    if not rows:
        return []
    size, device = run.settings.per_device_train_batch_size, run.ranks.device
    lengths = [len(row.ids) for row in rows]
    micros = share_of_process(range(len(rows)), lengths, size, run.ranks.rank, run.ranks.size, max_micro_tokens(run))
    return [
        replace(build_batch([rows[i] for i in micro], run.family, run.model.config, device), is_idle=is_idle)
        for micro, is_idle in micros
    ]


def _rates_by_group(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Rate of each parameter group now. LoRA+ has two of a name: the peak tells them apart."""
    peaks: dict[str, set[float]] = {}
    for group in groups:
        peaks.setdefault(group["name"], set()).add(group["peak"])
    return {
        group["name"] if len(peaks[group["name"]]) == 1 else f"{group['name']} peak {group['peak']:g}": group["lr"]
        for group in groups
    }
