"""The cost page and the ledger's format page are true."""

from __future__ import annotations

import dataclasses
import json
import re
from decimal import Decimal
from pathlib import Path

import yaml

from pingjia.cost import CostSettings, bill
from pingjia.cost.prices import read_price_file
from pingjia.ledger import Fact, Ledger
from pingjia.recipe import Section, build

DOCS = Path(__file__).resolve().parents[2] / "docs"


class Wrapper(Section):
    cost: CostSettings


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_recipe_section_loads() -> None:
    section, _ = blocks("cost.md", "yaml")
    assert build(yaml.safe_load(section), Wrapper, flat=()).cost.price_per_hour == 2.5


def test_the_price_file_loads(tmp_path: Path) -> None:
    _, text = blocks("cost.md", "yaml")
    (tmp_path / "p.yaml").write_text(text)
    assert not read_price_file(tmp_path / "p.yaml").placeholder


def test_the_ledger_lines_are_what_a_ledger_writes(tmp_path: Path) -> None:
    (text,) = blocks("formats.md", "json")
    documented, written = tmp_path / "documented.jsonl", Ledger(tmp_path / "written.jsonl")
    documented.write_text(text)
    facts = [written.append(fact) for fact in Ledger(documented).read()]
    assert len(facts) == len(text.splitlines()) == 2
    assert [json.loads(line) for line in written.path.read_text().splitlines()] == [
        json.loads(line) for line in text.splitlines()
    ]
    assert bill(facts, CostSettings()).seconds == Decimal("348.535")


def test_every_field_of_a_fact_is_documented() -> None:
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    assert {field.name for field in dataclasses.fields(Fact)} | {"v"} <= documented
