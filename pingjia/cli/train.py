"""`pingjia train RECIPE`: tune an adapter, or the weights of a model themselves."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pingjia.cli.console import console, duration, megabytes, progress_bar
from pingjia.cli.schema import Recipe, ledger_path, load_recipe, save_recipe
from pingjia.cost.settings import CostSettings

if TYPE_CHECKING:
    from rich.progress import Progress

    from pingjia.tune import Hooks, TrainPlan, TrainResult
    from pingjia.tune.distributed import Holding
    from pingjia.tune.journal import StepLog
    from pingjia.tune.memory import MemoryPlan

RecipePath = Annotated[Path, typer.Argument(help="A YAML recipe; see recipes/.", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, as in the recipe.", metavar="[KEY=VALUE]...")]


def train(recipe: RecipePath, overrides: Overrides = None) -> int:
    """Tune a model as a recipe says: an adapter, or the weights themselves.

    The same command again goes on where it stopped. With a `prepare` section the rows are prepared first.
    """
    from pingjia.cli.prepare import with_prepared_data

    result = train_recipe(with_prepared_data(load_recipe(recipe, overrides or [])))
    return 0 if result.finished else 130


def train_recipe(recipe: Recipe, on_start: Callable[[], None] = lambda: None) -> TrainResult:
    """Train with a progress bar; Ctrl-C saves a checkpoint after the running update and stops.

    `on_start()` is called when everything is loaded and checked and nothing of another run is in the way.
    """
    from pingjia.cli.probes import examine, print_retention
    from pingjia.ledger import Ledger
    from pingjia.tune import launch
    from pingjia.tune import train as train_adapter

    if recipe.tune.distributed.strategy != "none" and not launch.is_rank():
        return _train_in_processes(recipe, on_start)
    if launch.is_rank():
        launch.die_with_launcher()
        on_start = launch.say_started
    with progress_bar(quiet=not launch.is_first()) as progress, _stop_on_signal() as should_stop:
        hooks = _hooks(progress, should_stop, on_start, recipe.cost)
        result = train_adapter(
            recipe.model,
            recipe.data,
            recipe.tune,
            ledger=Ledger(ledger_path(recipe)),
            run_name=Path(recipe.tune.output_dir).name,
            hooks=replace(hooks, examine=partial(examine, recipe), on_retention=print_retention),
        )
    if launch.is_first():
        _print_result(result)
    return result


def _train_in_processes(recipe: Recipe, on_start: Callable[[], None]) -> TrainResult:
    """The same command in every process, with the recipe as it has been read."""
    from pingjia.tune import launch
    from pingjia.tune.run import result_so_far

    layout = launch.layout_of(recipe.tune.distributed)
    console.print(f"  {layout.num_processes} processes here of {layout.world_size}, {recipe.tune.distributed.strategy}")
    with tempfile.TemporaryDirectory(prefix="pingjia-recipe-") as folder:
        file = Path(folder) / "recipe.yaml"
        save_recipe(recipe, file)
        command = [sys.executable, "-m", "pingjia.cli.main", "train", str(file)]
        code = launch.launch(command, layout, on_start)
    return result_so_far(recipe.tune, finished=code == 0)


def _hooks(
    progress: Progress, should_stop: Callable[[], bool], on_start: Callable[[], None], cost: CostSettings
) -> Hooks:
    from pingjia.tune import Hooks

    task, pace = progress.add_task("loading", total=None, note=""), Pace(cost)

    def on_plan(plan: TrainPlan) -> None:
        _print_plan(plan)
        progress.reset(task, description="training", total=plan.num_steps, note="")
        on_start()

    def on_step(log: StepLog) -> None:
        progress.update(task, completed=log.step, note=f"loss {log.loss:.3f}  {pace.note(log)}")
        if log.eval_loss is not None:
            phase = f"{log.phase}, " if log.phase else ""
            console.print(f"  {phase}epoch {log.epoch:g}: loss {log.loss:.3f}, held-out loss {log.eval_loss:.3f}")
        if log.event is not None:
            console.print(f"  update {log.step}: {log.event}", markup=False)

    def on_shared_out(holdings: Sequence[Holding]) -> None:
        for holding in holdings:
            console.print(f"  {holding}")

    def on_warning(text: str) -> None:
        console.print(f"  {text}", markup=False)

    return Hooks(
        on_plan=on_plan,
        on_step=on_step,
        on_shared_out=on_shared_out,
        on_warning=on_warning,
        should_stop=should_stop,
    )


class Pace:
    """How fast a run goes, and what is left of it, from its last updates."""

    def __init__(self, cost: CostSettings) -> None:
        self._cost = cost
        self._last: deque[StepLog] = deque(maxlen=20)

    def note(self, log: StepLog) -> str:
        """`152 tok/s, 60 learnt/s  1.20 GB  0.35 CNY to go`: over the last 20 updates, which differ in length."""
        self._last.append(log)
        seconds = sum(each.seconds for each in self._last)
        tokens, learnt = (sum(getattr(each, name) for each in self._last) for name in ("num_tokens", "num_learnt"))
        left_s = seconds / len(self._last) * (log.num_steps - log.step)
        money = left_s / 3600 * self._cost.price_per_hour
        return (
            f"{tokens / seconds:.0f} tok/s, {learnt / seconds:.0f} learnt/s  {megabytes(log.peak_bytes)}  "
            f"{money:.2f} {self._cost.currency} to go"
        )


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """The first SIGINT or SIGTERM asks the run to stop after its update; a second one is not held back."""
    stopping = False

    def ask(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True
        console.print("stopping after this update (again to stop at once)")
        for n in before:
            signal.signal(n, before[n])

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for n in before:
        signal.signal(n, ask)
    try:
        yield lambda: stopping
    finally:
        for n in before:
            signal.signal(n, before[n])


def _print_plan(plan: TrainPlan) -> None:
    share = 100 * plan.num_trainable / plan.num_parameters
    names, count = ", ".join(plan.targets.names), len(plan.targets.modules)
    what = {"lora": f"adapter on {count} linears ({names})", "full": f"full: weights of {count} modules ({names})"}
    console.print(
        f"  {what.get(plan.finetuning_type, f'freeze: all but {count} modules ({names})')}: "
        f"{plan.num_trainable:,} trainable of {plan.num_parameters:,} parameters ({share:.2f} %)"
    )
    console.print(
        f"  {plan.num_rows} rows, {plan.num_tokens:,} tokens of which {plan.num_learnt:,} are learnt; "
        f"longest row {plan.longest} tokens; {plan.num_steps} updates"
    )
    _print_rates(plan)
    if plan.memory is not None:
        _print_memory(plan.memory)
    for problem in plan.dropped:
        console.print(f"  dropped: {problem}", markup=False)
    if plan.resume_from is not None:
        console.print(f"  going on from {plan.resume_from}")


def _print_rates(plan: TrainPlan) -> None:
    """Which layers learn at which rate; only where there is more than one line to it."""
    if len(plan.rates) < 2:
        return
    table = Table(box=None, pad_edge=False)
    for name in ("  phase", "layers", "modules", "rate", "parameters", "updates"):
        table.add_column(name, justify="right" if name in ("rate", "parameters", "updates") else "left")
    for row in plan.rates:
        count, steps = f"{row.num_parameters:,}", str(row.num_steps)
        table.add_row(f"  {row.phase}", row.layers, ", ".join(row.modules), f"{row.rate:g}", count, steps)
    console.print(table)


def _print_memory(plan: MemoryPlan) -> None:
    learning = plan.adapters + plan.gradients + plan.optimizer
    console.print(
        f"  memory: about {megabytes(plan.total)}: frozen {megabytes(plan.weights)}, what learns with gradients and "
        "optimizer "
        f"{megabytes(learning)}, activations of the longest batch ({plan.num_tokens:,} tokens) "
        f"{megabytes(plan.activations + plan.working)}, logits {megabytes(plan.logits)}, kept states "
        f"{megabytes(plan.kept_states)}, the program itself {megabytes(plan.process)}"
    )


def _print_result(result: TrainResult) -> None:
    if result.was_finished:
        console.print(f"  {result.output_dir} is already trained from these very inputs; nothing to do")
    elif not result.finished:
        console.print(f"  stopped after update {result.num_steps}; the same command goes on from there")
        return
    held_out = f", held-out loss {result.eval_loss:.3f}" if result.eval_loss is not None else ""
    console.print(
        f"  loss {result.last_loss:.3f}{held_out}; {result.num_steps} updates in {duration(result.seconds)}, "
        f"{result.trained_tokens / result.seconds:.0f} tok/s; peak memory {megabytes(result.peak_bytes)}; "
        f"{megabytes(result.stored_bytes)} in {result.output_dir}"
    )
