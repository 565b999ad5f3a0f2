"""Prices and a ledger -> what a gateway asks of a key's budget; what cannot be obeyed is said before anything runs."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pingjia.cli.budgets import spent_by_key, split_prices
from pingjia.cost.settings import CostSettings
from pingjia.errors import RecipeError, UserError
from pingjia.gateway.keys import KeyFile
from pingjia.gateway.settings import GatewaySettings
from pingjia.ledger import Fact, Ledger


@pytest.fixture
def settings(tmp_path):
    return GatewaySettings(keys_file=str(tmp_path / "keys.json"))


def test_prices_are_told_from_other_settings():
    others, cost = split_prices(["serve.port=1", "cost.price_per_hour=2.5", "engine.x=cost.y"])
    assert others == ["serve.port=1", "engine.x=cost.y"]
    assert cost.price_per_hour == 2.5
    with pytest.raises(RecipeError, match="price_per_hour"):
        split_prices(["cost.price_per_hou=2"])


def test_it_is_counted_from_the_ledger(settings, tmp_path):
    key = KeyFile(settings.keys_file).create("a", monthly_budget_cny=1.0).key
    ledger = Ledger(tmp_path / "ledger.jsonl")
    spent = spent_by_key(settings, CostSettings(price_per_hour=3600), ledger.path)
    assert spent(key.id) == 0
    now = datetime.now(UTC).isoformat()
    ledger.append(Fact("serve.request", at=now, seconds=10, who=key.id, note={"share_s": 2.5}))
    assert spent(key.id) == 2.5


def test_no_keys_and_no_ledger_is_nothing_to_count(settings, tmp_path):
    assert spent_by_key(GatewaySettings(), CostSettings(), tmp_path / "l") is None
    KeyFile(settings.keys_file).create("a")
    assert spent_by_key(settings, CostSettings(), None) is None


def test_a_budget_without_a_ledger_is_said(settings):
    keys = KeyFile(settings.keys_file)
    keys.create("a", monthly_budget_cny=1.0)
    with pytest.raises(UserError, match=r"'a'.*--ledger"):
        spent_by_key(settings, CostSettings(), None)
    keys.revoke("a")
    assert spent_by_key(settings, CostSettings(), None) is None


def test_yuan_are_not_dollars(settings, tmp_path):
    KeyFile(settings.keys_file).create("a", monthly_budget_cny=1.0)
    with pytest.raises(UserError, match="USD"):
        spent_by_key(settings, CostSettings(currency="USD"), tmp_path / "l")
