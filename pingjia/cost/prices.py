"""Settings and price files -> the prices a bill uses and whose they are. The only part of cost/ that reads a file."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pydantic

from pingjia.cost.settings import CostSettings, Currency
from pingjia.errors import RecipeError
from pingjia.recipe import Section, near_miss, read_yaml

EXAMPLE_PRICES = Path(__file__).with_name("prices.yaml")


class Price(Section):
    """One entry of a price file: the whole machine, per hour."""

    price_per_hour: float = pydantic.Field(ge=0, allow_inf_nan=False)
    provider: str = ""
    electricity_price_per_kwh: float = pydantic.Field(default=0.0, ge=0, allow_inf_nan=False)
    power_w: float | None = pydantic.Field(default=None, ge=0, allow_inf_nan=False)


class PriceFile(Section):
    """A dated list of prices in one currency. `placeholder` marks figures that nobody checked."""

    date: datetime.date
    currency: Currency
    placeholder: bool = False
    entries: dict[str, Price] = pydantic.Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Prices:
    """What a bill multiplies with. Fractions hold the decimal figures exactly. `source` says whose figures they are."""

    per_hour: Fraction
    per_kwh: Fraction
    power_w: Fraction | None
    currency: Currency
    hardware: str
    source: str


def resolve(settings: CostSettings) -> Prices:
    """The prices in force: the recipe's own figures first, then the price file's entry named by `hardware`.

    Raises RecipeError for a price file that cannot be used, an unknown entry, or a currency that contradicts it.
    """
    if settings.price_file is None:
        return _own_prices(settings)
    path = EXAMPLE_PRICES if settings.price_file == "example" else Path(settings.price_file).expanduser()
    return _from_file(settings, read_price_file(path), settings.price_file)


def read_price_file(path: Path) -> PriceFile:
    """A checked price file. Raises RecipeError with one line per problem, near misses named."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such price file; copy and edit {EXAMPLE_PRICES}")
    raw = read_yaml(path)
    problems = _unknown_keys(raw)
    try:
        found = PriceFile.model_validate(raw)
    except pydantic.ValidationError as e:
        known = [error for error in e.errors(include_url=False) if error["type"] != "extra_forbidden"]
        problems += [f"{'.'.join(map(str, error['loc']))}: {error['msg'].lower()}" for error in known]
        found = None
    if problems or found is None:
        raise RecipeError("\n".join(f"{path}: {problem}" for problem in problems))
    return found


def exact(figure: float) -> Fraction:
    """The decimal number that was written, not its binary neighbour: 0.1 is one tenth."""
    return Fraction(repr(float(figure)))


def _unknown_keys(raw: dict[str, Any]) -> list[str]:
    entries = raw.get("entries")
    places: list[tuple[str, dict[Any, Any], type[Section]]] = [("", raw, PriceFile)]
    if isinstance(entries, dict):
        places += [(f"entries.{name}.", entry, Price) for name, entry in entries.items() if isinstance(entry, dict)]
    return [
        f"{prefix}{key}: unknown key{near_miss(str(key), model.model_fields)}"
        for prefix, found, model in places
        for key in found
        if key not in model.model_fields
    ]


def _own_prices(settings: CostSettings) -> Prices:
    given = "price_per_hour" in settings.model_fields_set
    source = "cost.price_per_hour" if given else "PLACEHOLDER of 1.00 per hour: set cost.price_per_hour to yours"
    return Prices(
        per_hour=exact(settings.price_per_hour),
        per_kwh=exact(settings.electricity_price_per_kwh),
        power_w=None if settings.power_w is None else exact(settings.power_w),
        currency=settings.currency,
        hardware=settings.hardware,
        source=source,
    )


def _from_file(settings: CostSettings, file: PriceFile, name: str) -> Prices:
    entry = _entry(settings.hardware, file, name)
    if "currency" in settings.model_fields_set and settings.currency != file.currency:
        raise RecipeError(f"cost.currency is {settings.currency}, but {name} is in {file.currency}; make them equal")
    chosen = {**entry.model_dump(), **settings.model_dump(include=settings.model_fields_set)}
    power_w = chosen["power_w"]
    return Prices(
        per_hour=exact(chosen["price_per_hour"]),
        per_kwh=exact(chosen["electricity_price_per_kwh"]),
        power_w=None if power_w is None else exact(power_w),
        currency=file.currency,
        hardware=settings.hardware,
        source=_source(settings, file, name),
    )


def _entry(hardware: str, file: PriceFile, name: str) -> Price:
    if hardware not in file.entries:
        known = ", ".join(file.entries)
        found = f"{hardware!r} is not in {name}{near_miss(hardware, file.entries)}" if hardware else "missing"
        raise RecipeError(f"cost.hardware: {found}; entries: {known}")
    return file.entries[hardware]


def _source(settings: CostSettings, file: PriceFile, name: str) -> str:
    text = f"{name}, {settings.hardware}, checked {file.date.isoformat()}"
    if file.placeholder:
        text = f"PLACEHOLDERS of {name}, {settings.hardware}: put your own figures in"
    if "price_per_hour" in settings.model_fields_set:
        text = f"cost.price_per_hour; the rest from {text}"
    return text
