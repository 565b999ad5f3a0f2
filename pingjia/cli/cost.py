"""`pingjia cost report`: the bill for what a ledger holds; `pingjia cost estimate`: what a year would cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pingjia import recipe as recipes
from pingjia.cli import compare
from pingjia.cli.console import console
from pingjia.cli.schema import Recipe
from pingjia.cost.calculator import Assumptions
from pingjia.cost.settings import CostSettings
from pingjia.errors import DataError

if TYPE_CHECKING:
    from pingjia.cost import Part
    from pingjia.ledger import Fact


class By(StrEnum):
    """What a bill is taken apart by."""

    run = "run"
    who = "who"
    month = "month"
    request = "request"


app = typer.Typer(help="What it cost.", no_args_is_help=True)
app.command("compare")(compare.compare)


@app.command("report")
def report(
    ledger: Annotated[Path, typer.Argument(help="A ledger.jsonl, or a directory that holds one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Prices: price_per_hour=2.5 currency=CNY ...", metavar="[KEY=VALUE]...")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the bill as JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the bill as CSV.")] = False,
    by: Annotated[By | None, typer.Option("--by", help="Take it apart by this instead.")] = None,
    chart: Annotated[Path | None, typer.Option("--chart", help="Draw it, as this PNG file.")] = None,
) -> None:
    """Price what a ledger holds: per stage, per 1,000 tokens; per run, key, month or request with --by."""
    from pingjia.cost import bill, breakdown

    facts, prices = _facts(ledger), _settings(overrides or [])
    result = bill(facts, prices)
    parts = breakdown(facts, prices, (by or By.who).value)
    if chart is not None:
        from pingjia.cost.chart import draw

        chart.write_bytes(draw(result, parts, f"by {(by or By.who).value}"))
    if by is not None:
        _print_parts(parts, result.currency, as_json=as_json, as_csv=as_csv)
    elif as_json:
        console.print_json(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        console.print(result.to_csv() if as_csv else "\n".join(result.lines()), markup=False)


@app.command("estimate")
def estimate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="A ledger that knows some of it, then what is assumed: users=1000 price_per_hour=2.5 ...",
            metavar="[LEDGER] [KEY=VALUE]...",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """What would a run, a request, a user and a year cost? Every assumption is named with where it comes from."""
    from pingjia.cost import estimate as calculate
    from pingjia.cost import resolve

    given = arguments or []
    ledgers, overrides = [a for a in given if "=" not in a], [a for a in given if "=" in a]
    if len(ledgers) > 1:
        raise DataError(f"{len(ledgers)} ledgers named ({', '.join(ledgers)}); one at most")
    asked = _asked(overrides)
    result = calculate(asked.assume, resolve(asked.cost), _facts(Path(ledgers[0])) if ledgers else [])
    if as_json:
        console.print_json(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        console.print("\n".join(result.lines()), markup=False)


def _facts(ledger: Path) -> list[Fact]:
    from pingjia.ledger import Ledger

    file = ledger / "ledger.jsonl" if ledger.is_dir() else ledger
    if not file.is_file():
        raise DataError(f"{file}: no ledger here; runs write one into their output_dir")
    return list(Ledger(file).read())


def _print_parts(parts: Sequence[Part], currency: str, *, as_json: bool, as_csv: bool) -> None:
    from rich.table import Table

    from pingjia.cost.parts import to_csv

    if as_json:
        console.print_json(
            json.dumps({"currency": currency, "parts": [p.to_dict() for p in parts]}, ensure_ascii=False)
        )
        return
    if as_csv:
        console.print(to_csv(parts, currency), markup=False)
        return
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(("", "requests", "cached", "prompt", "answered", "trained", "seconds", currency)):
        table.add_column(column, justify="left" if i == 0 else "right")
    for p in parts:
        counts = (p.num_requests, p.num_cache_hits, p.prompt_tokens, p.completion_tokens, p.trained_tokens)
        table.add_row(p.name, *(f"{n:,}" if n else "" for n in counts), f"{p.seconds:.2f}", f"{p.cost:f}")
    console.print(table)


def print_bill(recipe: Recipe, ledger: Path) -> None:
    """The bill of everything that a recipe's runs have spent so far."""
    from pingjia.cost import bill
    from pingjia.ledger import Ledger

    for line in bill(Ledger(ledger).read(), recipe.cost).lines():
        console.print(f"  {line}", markup=False)


def _settings(overrides: list[str]) -> CostSettings:
    class Prices(recipes.Section):
        cost: CostSettings = CostSettings()

    return recipes.build(_raw(overrides), Prices, flat=("cost",), name="prices").cost


class _Asked(recipes.Section):
    assume: Assumptions = Assumptions()
    cost: CostSettings = CostSettings()


def _asked(overrides: list[str]) -> _Asked:
    return recipes.build(_raw(overrides), _Asked, flat=("assume", "cost"), name="assumptions")


def _raw(overrides: list[str]) -> dict[str, object]:
    raw: dict[str, object] = {}
    for override in overrides:
        recipes.assign(raw, *recipes.split_override(override))
    return raw
