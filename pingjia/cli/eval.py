"""`pingjia eval TARGET`: held-out questions, answered before and after tuning, or by anything that answers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pingjia.cli.console import console, errors, progress_bar
from pingjia.cli.schema import Recipe, ledger_path, load_recipe
from pingjia.cli.sides import FORMS, check_side, generator_of
from pingjia.cli.train import Overrides
from pingjia.errors import DataError, RecipeError

if TYPE_CHECKING:
    from pingjia import Engine
    from pingjia.evaluate import Comparison, EvalReport, EvalSettings
    from pingjia.models import Encoder
    from pingjia.types import Example, Generator, Scorer

MOSTLY_KNOWN = 0.25  # unknown tokens beyond this share make a score doubtful


def evaluate(
    target: Annotated[str, typer.Argument(help=f"A recipe (before and after), or anything that answers: {FORMS}.")],
    overrides: Overrides = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Compare with this one, on the same questions; the same forms.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint",
            help="With a recipe: ask this OpenAI-compatible server instead, e.g. http://127.0.0.1:8000/v1; key in "
            "OPENAI_API_KEY.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="With --endpoint: the model's name there.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Without a recipe: where reports go.")] = Path("eval"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Score answers on held-out questions: a recipe's base and tuned model, or any model, adapter or server.

    Without a recipe say what is asked: pingjia eval http://127.0.0.1:8000/v1#tuned questions=heldout.jsonl
    """
    if not target.endswith((".yaml", ".yml")):
        _evaluate_side(target, against, overrides or [], out, as_json=as_json)
        return
    loaded = load_recipe(Path(target), overrides or [])
    if endpoint is None and against is None:
        comparison = compare_recipe(loaded)
        _print_json(comparison.to_dict()) if as_json else print_comparison(comparison, report_dir(loaded))
        return
    if against is not None:
        check_side(against)
        # Beside the recipe's own comparison, which is before and after.
        _compare_sides((against, target), _questions(loaded), report_dir(loaded) / "against", as_json=as_json)
        return
    assert endpoint is not None
    _print_report(_evaluate_endpoint(loaded, endpoint, model), as_json=as_json)


def _evaluate_side(target: str, against: str | None, overrides: list[str], out: Path, *, as_json: bool) -> None:
    asked = _questions_of(_settings(overrides), domains=None)
    for side in filter(None, (target, against)):
        check_side(side)
    if against is not None:
        _compare_sides((against, target), asked, out, as_json=as_json)
        return
    report = _report_of(target, asked)
    report.save(out / "report.json")
    _print_report(report, as_json=as_json)


def _compare_sides(
    sides: tuple[str, str], asked: tuple[EvalSettings, list[Example]], out: Path, *, as_json: bool
) -> None:
    """`sides`: what it is compared with, then what is evaluated."""
    from pingjia.evaluate import compare, save_comparison

    before, after = (_report_of(side, asked) for side in sides)
    comparison = compare(before, after)
    before.save(out / "before.json")
    after.save(out / "after.json")
    save_comparison(comparison, out)
    _print_json(comparison.to_dict()) if as_json else print_comparison(comparison, out)


def _report_of(side: str, asked: tuple[EvalSettings, list[Example]]) -> EvalReport:
    settings, questions = asked
    generator = generator_of(side)
    scorer = None if side.startswith(("http://", "https://")) else cast("Scorer", generator)
    return _ask(questions, generator, settings, side, _encoder("auto", settings, questions), scorer)


def _print_report(report: EvalReport, *, as_json: bool) -> None:
    if as_json:
        _print_json(report.to_dict())
    else:
        console.print("\n".join(report.lines()), markup=False)


def _settings(overrides: list[str]) -> EvalSettings:
    from pingjia import recipe as recipes
    from pingjia.evaluate.settings import EvalSettings

    class Asked(recipes.Section):
        eval: EvalSettings = EvalSettings()

    raw: dict[str, object] = {}
    for override in overrides:
        recipes.assign(raw, *recipes.split_override(override))
    return recipes.build(raw, Asked, flat=("eval",), name="what is asked").eval


def compare_recipe(recipe: Recipe) -> Comparison:
    """Before and after: the base, then what was tuned. Saves reports and pages."""
    from pingjia.evaluate import compare, save_comparison
    from pingjia.ledger import Ledger
    from pingjia.meter import Meter

    settings, questions = _questions(recipe)
    encoder = _encoder(recipe.model.device, settings, questions)
    ledger, run = Ledger(ledger_path(recipe)), Path(recipe.tune.output_dir).name
    folder = report_dir(recipe)
    reports: list[EvalReport] = []
    sides = _sides(recipe)
    for name in ("before", "after"):
        with Meter() as meter:
            side = next(sides)
            report = _ask(questions, side, settings, f"{name:<6}", encoder, side)
        report.save(folder / f"{name}.json")
        ledger.append(_with_time(report.fact(f"eval.{name}", run=run), meter.seconds, meter.peak_bytes))
        reports.append(report)
    comparison = compare(*reports)
    save_comparison(comparison, folder)
    return comparison


def _sides(recipe: Recipe) -> Iterator[_On]:
    """The base, then the tuned one: an adapter beside it on the same engine, or a model that takes its place."""
    output_dir = recipe.tune.output_dir
    if recipe.tune.finetuning_type == "lora":
        engine = recipe_engine(recipe, recipe.model.model_name_or_path, adapter=output_dir)
        yield _On(engine, None)
        yield _On(engine, engine.models()[-1].id)
        return
    yield _On(recipe_engine(recipe, recipe.model.model_name_or_path), None)
    yield _On(recipe_engine(recipe, output_dir), None)


def recipe_engine(recipe: Recipe, model: str, adapter: str | None = None) -> Engine:
    """An engine for `model` as the recipe runs models."""
    from pingjia import Engine

    numbers = recipe.model
    return Engine(
        model,
        adapter=adapter,
        settings=recipe.engine,
        bits=numbers.quantization_bit,
        dtype=numbers.dtype,
        device=numbers.device,
    )


def print_comparison(comparison: Comparison, folder: Path) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("metric", "questions", "before", "after", "change", "95 % interval"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, change in comparison.overall.items():
        table.add_row(
            name,
            str(change.count),
            f"{100 * change.before:.1f}",
            f"{100 * change.after:.1f}",
            f"{100 * change.difference:+.1f}",
            f"{100 * change.low:+.1f} to {100 * change.high:+.1f}",
        )
    console.print(table)
    console.print(f"  scores out of 100; every answer side by side in {folder / 'comparison.html'}")


def report_dir(recipe: Recipe) -> Path:
    return Path(recipe.tune.output_dir) / "eval"


class _On:
    """An engine's base (None) or one of its adapters as a Generator and Scorer."""

    def __init__(self, engine: Engine, adapter: str | None) -> None:
        self._engine, self._adapter = engine, adapter

    def generate(self, prompts, sampling=None, *, on_done=None):  # type: ignore[no-untyped-def]  # see Generator
        return self._engine.generate(prompts, sampling, on_done=on_done, adapter=self._adapter)

    def likelihoods(self, prompts, answers, *, with_end=True, on_done=None):  # type: ignore[no-untyped-def]  # see Scorer
        return self._engine.likelihoods(prompts, answers, with_end=with_end, on_done=on_done, adapter=self._adapter)


def _evaluate_endpoint(recipe: Recipe, url: str, model: str | None) -> EvalReport:
    from pingjia.evaluate import Endpoint

    if model is None:
        raise RecipeError("--endpoint needs --model NAME (as listed at /v1/models there)")
    settings, questions = _questions(recipe)
    encoder = _encoder(recipe.model.device, settings, questions)
    return _ask(questions, Endpoint(url, model, api_key=os.environ.get("OPENAI_API_KEY")), settings, model, encoder)


def _encoder(device: str, settings: EvalSettings, questions: Sequence[Example]) -> Encoder | None:
    """The encoder of `bert_score`, where it is asked for. Says so when it cannot read the answers it is to compare."""
    if "bert_score" not in settings.metrics:
        return None
    from pingjia.evaluate import expected_answer
    from pingjia.models import load_encoder

    encoder = load_encoder(settings.encoder, layer=settings.encoder_layer, device=device)
    share = encoder.unknown_share([expected_answer(question) for question in questions])
    if share > MOSTLY_KNOWN:
        errors.print(
            f"note: the encoder {settings.encoder} does not know {share:.0%} of the tokens of the expected answers, so "
            "bert_score says little; name an encoder of their language: eval.encoder=DIRECTORY"
        )
    return encoder


def _ask(
    questions: Sequence[Example],
    generator: Generator,
    settings: EvalSettings,
    label: str,
    encoder: Encoder | None,
    scorer: Scorer | None = None,
) -> EvalReport:
    from pingjia.evaluate import evaluate as run_evaluation
    from pingjia.evaluate import select

    with progress_bar(errors) as progress:  # stdout may be read as JSON
        task = progress.add_task(f"answers {label}", total=len(select(questions, settings.max_questions)), note="")
        return run_evaluation(
            questions,
            generator,
            settings,
            on_done=lambda index, answer: progress.advance(task),
            encoder=encoder,
            scorer=scorer,
        )


def _questions(recipe: Recipe) -> tuple[EvalSettings, list[Example]]:
    return _questions_of(recipe.eval, recipe.data.domains)


def _questions_of(settings: EvalSettings | None, domains: Sequence[str] | None) -> tuple[EvalSettings, list[Example]]:
    from pingjia import data

    if settings is None or not settings.questions:
        raise RecipeError("eval.questions: missing; name a file of held-out questions (eval.questions=FILE)")
    problems: list[str] = []
    questions = list(
        data.read_examples(settings.questions, domains=domains, on_problem=lambda p: problems.append(str(p)))
    )
    if problems:
        raise DataError("\n".join(problems[:10]) + f"\n{len(problems)} questions cannot be asked; correct them")
    return settings, questions


def _with_time(fact, seconds: float, peak_bytes: int):  # type: ignore[no-untyped-def]
    import dataclasses

    return dataclasses.replace(fact, seconds=round(seconds, 3), peak_bytes=peak_bytes)


def _print_json(value: object) -> None:
    console.print_json(json.dumps(value, ensure_ascii=False))
