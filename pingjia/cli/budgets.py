"""Prices and a ledger -> what a gateway asks before it lets a key with a budget in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pingjia import recipe as recipes
from pingjia.cost.settings import CostSettings
from pingjia.errors import UserError
from pingjia.gateway.settings import GatewaySettings


class _Prices(recipes.Section):
    cost: CostSettings = CostSettings()


def split_prices(overrides: Sequence[str]) -> tuple[list[str], CostSettings]:
    """`cost.KEY=VALUE` overrides as the section `cost:`, and the others as they are. Raises RecipeError."""
    raw: dict[str, object] = {}
    others = []
    for override in overrides:
        if override.lstrip().startswith("cost."):
            recipes.assign(raw, *recipes.split_override(override))
        else:
            others.append(override)
    return others, recipes.build(raw, _Prices, flat=(), name="--set").cost


def spent_by_key(settings: GatewaySettings, cost: CostSettings, ledger: Path | None) -> Callable[[str], float] | None:
    """Id of a key -> yuan it has spent this month; None without a file of keys or a ledger.

    Raises UserError for a key with a budget where there is no ledger, or prices in another currency.
    """
    from pingjia.cost.prices import resolve
    from pingjia.cost.spending import Spending

    budgeted = _first_with_budget(settings)
    if budgeted is not None and ledger is None:
        raise UserError(f"key {budgeted!r} has a monthly budget, which a ledger must count: serve with --ledger FILE")
    if settings.keys_file is None or ledger is None:
        return None
    prices = resolve(cost)
    if budgeted is not None and prices.currency != "CNY":
        raise UserError(f"key {budgeted!r} has a budget in yuan, and prices are in {prices.currency}; give them in CNY")
    spending = Spending(ledger, prices)
    return lambda key_id: float(spending.of(key_id).cost)


def _first_with_budget(settings: GatewaySettings) -> str | None:
    from pingjia.gateway.keys import KeyFile

    keys = KeyFile(settings.keys_file).read() if settings.keys_file is not None else []
    return next((key.name for key in keys if key.monthly_budget_cny is not None and key.revoked_at is None), None)
