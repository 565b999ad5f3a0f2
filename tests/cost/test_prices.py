"""Price files: strict, dated, and the packaged one is no claim about anybody's prices."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from pingjia.cost import EXAMPLE_PRICES, CostSettings, bill, resolve
from pingjia.cost.prices import read_price_file
from pingjia.errors import RecipeError
from pingjia.ledger import Fact
from pingjia.recipe import Section, build

GOOD = """
date: 2025-03-01
currency: USD
entries:
  box-a: {price_per_hour: 0.35, provider: me, electricity_price_per_kwh: 0.12, power_w: 300}
  box-b: {price_per_hour: 2}
"""


@pytest.fixture
def prices(tmp_path: Path) -> str:
    path = tmp_path / "prices.yaml"
    path.write_text(GOOD)
    return str(path)


def test_the_packaged_file_loads_and_says_that_it_is_an_example() -> None:
    found = read_price_file(EXAMPLE_PRICES)
    assert found.placeholder
    assert all(entry.provider.startswith("example") for entry in found.entries.values())
    assert "placeholder" in EXAMPLE_PRICES.read_text(encoding="utf-8").splitlines()[0]
    used = bill([Fact("train", seconds=1.0)], CostSettings(price_file="example", hardware="rented-gpu-24gb"))
    assert "PLACEHOLDERS" in used.lines()[0]


def test_an_entry_is_found_by_its_hardware(prices: str) -> None:
    found = resolve(CostSettings(price_file=prices, hardware="box-a"))
    assert (found.per_hour, found.per_kwh, found.power_w) == (Fraction(35, 100), Fraction(12, 100), 300)
    assert found.currency == "USD"
    assert found.source == f"{prices}, box-a, checked 2025-03-01"
    assert resolve(CostSettings(price_file=prices, hardware="box-b")).power_w is None


def test_the_recipes_own_figures_win(prices: str) -> None:
    found = resolve(CostSettings(price_file=prices, hardware="box-a", price_per_hour=1.0, power_w=100.0))
    assert (found.per_hour, found.per_kwh, found.power_w) == (1, Fraction(12, 100), 100)
    assert found.source.startswith("cost.price_per_hour; the rest from")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hardware": "box-c"}, "cost.hardware: 'box-c' is not in .*did you mean box-"),
        ({}, "cost.hardware: missing; entries: box-a, box-b"),
        ({"hardware": "box-a", "currency": "CNY"}, "cost.currency is CNY, but .* is in USD"),
    ],
)
def test_a_recipe_that_contradicts_the_file(prices: str, fields: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve(CostSettings(price_file=prices, **fields))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GOOD.replace("price_per_hour: 2", "price_per_hours: 2"),
            "entries.box-b.price_per_hours: unknown key; did you mean price_per_hour",
        ),
        (GOOD.replace("currency", "curency"), "curency: unknown key; did you mean currency"),
        (GOOD.replace("0.35", "-1"), "entries.box-a.price_per_hour: .*greater than or equal to 0"),
        (GOOD.replace("0.35", ".inf"), "entries.box-a.price_per_hour: .*finite"),
        (GOOD.replace("0.35", "cheap"), "entries.box-a.price_per_hour: .*valid number"),
        (GOOD.replace("USD", "EUR"), "currency: .*'cny' or 'usd'"),
        (GOOD.replace("2025-03-01", "spring"), "date: "),
        (GOOD.replace("box-b", "box-a"), "box-a: given twice"),
        ("date: 2025-03-01\ncurrency: CNY\nentries: {}\n", "entries: .*at least 1"),
        ("date: 2025-03-01\ncurrency: CNY\nentries: [1]\n", "entries: "),
        ("date: 2025-03-01\ncurrency: CNY\nentries: {4090: {price_per_hour: 1}}\n", "entries.4090"),
        ("- 1\n", "mapping"),
        ("a: [\n", "not valid YAML"),
        ("", "date: field required"),
    ],
)
def test_a_price_file_is_read_strictly(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        resolve(CostSettings(price_file=str(path), hardware="box-a"))
    assert str(path) in str(caught.value)


def test_a_missing_price_file_names_the_one_to_copy(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such price file; copy and edit .*prices\.yaml"):
        resolve(CostSettings(price_file=str(tmp_path / "none.yaml")))


class Wrapper(Section):
    cost: CostSettings


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"price_per_hour": -1}, "price_per_hour"),
        ({"price_per_hour": float("nan")}, "price_per_hour"),
        ({"currency": "EUR"}, "currency"),
        ({"price_per_hours": 1}, "price_per_hours: unknown key"),
        ({"power_w": -3}, "power_w"),
    ],
)
def test_settings_are_strict(section: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build({"cost": section}, Wrapper, flat=())
