"""`pingjia cost report`: the bill for what a ledger holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pingjia import recipe as recipes
from pingjia.cli import compare
from pingjia.cli.console import console
from pingjia.cli.schema import Recipe
from pingjia.cost.settings import CostSettings
from pingjia.errors import DataError

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
) -> None:
    """Price what a ledger holds: per stage, per 1,000 tokens, per request."""
    from pingjia.cost import bill
    from pingjia.ledger import Ledger

    file = ledger / "ledger.jsonl" if ledger.is_dir() else ledger
    if not file.is_file():
        raise DataError(f"{file}: no ledger here; runs write one into their output_dir")
    result = bill(Ledger(file).read(), _settings(overrides or []))
    if as_json:
        console.print_json(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        console.print(result.to_csv() if as_csv else "\n".join(result.lines()), markup=False)


def print_bill(recipe: Recipe, ledger: Path) -> None:
    """The bill of everything that a recipe's runs have spent so far."""
    from pingjia.cost import bill
    from pingjia.ledger import Ledger

    for line in bill(Ledger(ledger).read(), recipe.cost).lines():
        console.print(f"  {line}", markup=False)


def _settings(overrides: list[str]) -> CostSettings:
    class Prices(recipes.Section):
        cost: CostSettings = CostSettings()

    raw: dict[str, object] = {}
    for override in overrides:
        recipes.assign(raw, *recipes.split_override(override))
    return recipes.build(raw, Prices, flat=("cost",), name="prices").cost
