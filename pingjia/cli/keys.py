"""`pingjia keys`: make, list and end API keys, and see what they spent."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pingjia.cli.budgets import split_prices
from pingjia.cli.console import console, errors

if TYPE_CHECKING:
    from pingjia.cost.spending import Spent
    from pingjia.gateway.keys import Key

app = typer.Typer(help="API keys and their limits.", no_args_is_help=True)

_File = Annotated[Path, typer.Option("--file", envvar="PINGJIA_KEYS_FILE", help="The file of keys (serve.keys_file).")]
_Json = Annotated[bool, typer.Option("--json", help="For programs.")]
_FILE = Path("keys.json")
_NAME_HELP = "The key's name or id."


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: _File = _FILE,
    requests_per_minute: Annotated[int | None, typer.Option(help="More are refused with 429.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Prompts and answers together.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Answers in work at once.")] = None,
    monthly_budget: Annotated[float | None, typer.Option(help="Yuan a month (UTC), by the ledger.")] = None,
    models: Annotated[str | None, typer.Option(help="Models it may ask, with commas; all without.")] = None,
    expires: Annotated[str | None, typer.Option(help="90d, 12h, 2030-12-31 or a time.")] = None,
    priority: Annotated[int, typer.Option(help="-100 to 100; the higher is served first.")] = 0,
    tenant: Annotated[str, typer.Option(help="Keys of one tenant share cached answers.")] = "",
    admin: Annotated[bool, typer.Option("--admin", help="May empty other tenants' caches.")] = False,
    as_json: _Json = False,
) -> None:
    """Make a key. It is printed once; the file holds only a salted hash of it."""
    from pingjia.gateway.keys import KeyFile, parse_expiry

    new = KeyFile(file).create(
        name,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent=max_concurrent,
        monthly_budget_cny=monthly_budget,
        models=tuple(part.strip() for part in (models or "").split(",") if part.strip()),
        expires_at=parse_expiry(expires, datetime.now(UTC)) if expires else None,
        priority=priority,
        tenant=tenant,
        admin=admin,
    )
    if as_json:
        console.print_json(json.dumps({"key": new.secret, **_plain(new.key)}, ensure_ascii=False))
        return
    console.print(new.secret, markup=False)
    errors.print(f"key {new.key.id} for {name} is in {file}; this is the only time it is shown", markup=False)


@app.command("list")
def list_keys(file: _File = _FILE, as_json: _Json = False) -> None:
    """All keys with their limits, those that ended too."""
    from pingjia.gateway.keys import KeyFile

    keys = KeyFile(file).read()
    if as_json:
        console.print_json(json.dumps([_plain(key) for key in keys], ensure_ascii=False))
        return
    for key in keys:
        console.print(f"{key.id}  {key.name}: {_summary(key)}", markup=False)
    if not keys:
        errors.print(f"no keys in {file}; make one: pingjia keys create NAME --file {file}", markup=False)


@app.command("revoke")
def revoke(name: Annotated[str, typer.Argument(help=_NAME_HELP)], file: _File = _FILE) -> None:
    """End a key. Servers that use the file obey at the next request."""
    from pingjia.gateway.keys import KeyFile

    key = KeyFile(file).revoke(name)
    console.print(f"{key.id}  {key.name}: revoked", markup=False)


@app.command("show-usage")
def show_usage(
    ledger: Annotated[Path, typer.Option("--ledger", help="The server's ledger, or a directory that holds one.")],
    name: Annotated[str | None, typer.Argument(help=_NAME_HELP + " All keys without.")] = None,
    file: _File = _FILE,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Prices: cost.price_per_hour=2.5 ...")] = None,
    as_json: _Json = False,
) -> None:
    """What keys have asked and spent this month (UTC)."""
    from pingjia.cost.prices import resolve
    from pingjia.cost.spending import Spending, Spent
    from pingjia.errors import DataError, RecipeError
    from pingjia.gateway.keys import KeyFile

    path = ledger / "ledger.jsonl" if ledger.is_dir() else ledger
    if not path.is_file():
        raise DataError(f"{path}: no ledger here; serve writes one with --ledger FILE")
    keys = KeyFile(file)
    chosen = [keys.named(name)] if name else keys.read()
    others, prices = split_prices(overrides or [])
    if others:
        raise RecipeError(f"--set {others[0]}: only cost.KEY=VALUE has a meaning here")
    spending = Spending(path, resolve(prices))
    spent = spending.everyone()
    rows = [_usage(key, spent.get(key.id, Spent()), spending.prices.currency) for key in chosen]
    if as_json:
        console.print_json(json.dumps(rows, ensure_ascii=False))
        return
    for row in rows:
        console.print(_usage_line(row), markup=False)


def _plain(key: Key) -> dict[str, Any]:
    """A key for programs: neither salt nor hash."""
    return {k: v for k, v in key.model_dump(mode="json").items() if k not in ("salt", "digest")}


def _summary(key: Key) -> str:
    if key.revoked_at is not None:
        return f"revoked {key.revoked_at:%Y-%m-%d}"
    limits = [
        (key.requests_per_minute, "{} requests/min"),
        (key.tokens_per_minute, "{} tokens/min"),
        (key.max_concurrent, "{} at once"),
        (key.monthly_budget_cny, "{:g} CNY/month"),
        (", ".join(key.models) or None, "models {}"),
        (key.tenant or None, "tenant {}"),
        (key.priority or None, "priority {}"),
        (key.expires_at, "until {:%Y-%m-%d %H:%M} UTC"),
    ]
    parts = [text.format(value) for value, text in limits if value is not None]
    return ", ".join([*parts, *(["admin"] if key.admin else [])]) or "no limits"


def _usage(key: Key, spent: Spent, currency: str) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "num_requests": spent.num_requests,
        "num_cache_hits": spent.num_cache_hits,
        "prompt_tokens": spent.prompt_tokens,
        "completion_tokens": spent.completion_tokens,
        "cost": round(float(spent.cost), 6),
        "currency": currency,
        "monthly_budget_cny": key.monthly_budget_cny,
    }


def _usage_line(row: dict[str, Any]) -> str:
    budget = f" of {row['monthly_budget_cny']:g}" if row["monthly_budget_cny"] is not None else ""
    return (
        f"{row['id']}  {row['name']}: {row['num_requests']} requests ({row['num_cache_hits']} from the cache), "
        f"{row['prompt_tokens']:,} + {row['completion_tokens']:,} tokens, {row['cost']:.6f}{budget} {row['currency']}"
    )
