"""Preparing the rows of a recipe: what `pingjia data prepare`, `train` and `run` share. Wires the networks it needs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pingjia.cli.console import console, errors, progress_bar
from pingjia.cli.schema import Recipe, ledger_path

if TYPE_CHECKING:
    from pingjia.data import Prepared, Tools

STAGES = {
    "read": "reading",
    "duplicates": "duplicates",
    "quality": "BERTScore",
    "augment": "augmenting",
    "domains": "grouping",
    "shares": "shares",
    "write": "writing",
}


def prepare_recipe(recipe: Recipe, out: Path, *, ledger: Path | None = None, quiet: bool = False) -> Prepared:
    """Prepare a recipe's rows into `out`, with a progress bar; what it took goes to the ledger."""
    from pingjia import data
    from pingjia.data.settings import PrepareSettings
    from pingjia.ledger import Fact, Ledger
    from pingjia.meter import Meter

    with progress_bar(errors if quiet else console) as progress, Meter() as meter:
        total = data.estimate_rows([*recipe.data.dataset, *recipe.data.eval_dataset])
        task = progress.add_task("reading", total=total, note="")
        job = data.Job(
            data=recipe.data,
            settings=recipe.prepare or PrepareSettings(),
            model=recipe.model.model_name_or_path,
            out=out,
            tools=_tools(recipe),
            on_stage=lambda name: progress.update(task, description=STAGES.get(name, name)),
            on_rows=lambda count: progress.advance(task, count),
        )
        result = data.prepare(job)
        progress.update(task, total=result.report.num_rows, completed=result.report.num_rows, description="done")
    if ledger is not None and not result.was_finished:
        note = {"rows": result.report.num_rows, "kept": result.report.num_kept}
        seconds = round(meter.seconds, 3)
        Ledger(ledger).append(
            Fact("data.prepare", run=ledger.parent.name, seconds=seconds, peak_bytes=meter.peak_bytes, note=note)
        )
    return result


def print_prepared(result: Prepared, out: Path, *, indent: str = "") -> None:
    """What became of the rows, and where it lies."""
    from pingjia.data.report import summary_lines

    if result.was_finished:
        console.print(f"{indent}{out} holds the result of these very inputs already; nothing to do")
    for line in [*summary_lines(result.report), *(f"note: {note}" for note in result.report.notes[:20])]:
        console.print(f"{indent}{line}", markup=False)
    names = ", ".join(str(out / name) for name in ("train.jsonl", "rejected.jsonl", "report.html"))
    console.print(f"{indent}in {names}", markup=False)


def with_prepared_data(recipe: Recipe) -> Recipe:
    """The recipe as it is or, where it has a `prepare` section, with output_dir/data/train.jsonl as its data set."""
    if recipe.prepare is None:
        return recipe
    out = Path(recipe.tune.output_dir) / "data"
    result = prepare_recipe(recipe, out, ledger=ledger_path(recipe))
    print_prepared(result, out, indent="  ")
    data = recipe.data.model_copy(update={"dataset": [str(out / "train.jsonl")], "domains": None})
    return recipe.model_copy(update={"data": data})


def _tools(recipe: Recipe) -> Tools:
    from pingjia.data import Tools
    from pingjia.data.augment import Maker
    from pingjia.data.settings import BackTranslationSettings
    from pingjia.similarity import TextEncoder

    device = recipe.model.device

    class Loaded(Tools):
        """Networks that are loaded when a stage first needs them."""

        def encoder(self, name: str, layer: int | None) -> TextEncoder:
            from pingjia.models import load_encoder

            batch_size = recipe.prepare.quality.batch_size if recipe.prepare else 32
            return load_encoder(name, device=device, layer=layer, batch_size=batch_size)

        def back_translation(self, settings: BackTranslationSettings) -> Maker:
            from pingjia.data.back_translation import load_back_translation
            from pingjia.models.translator import load_translator

            return load_back_translation(settings, partial(load_translator, device=device))

    return Loaded()
