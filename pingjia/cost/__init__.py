"""Ledger and prices -> money. Arithmetic only; imports nothing but the base, and no torch."""

from pingjia.cost.bill import Bill, Line, Rates, Share, bill
from pingjia.cost.prices import EXAMPLE_PRICES, Prices, resolve
from pingjia.cost.settings import CostSettings
from pingjia.cost.storage import StorageComparison, compare_storage

__all__ = [
    "EXAMPLE_PRICES",
    "Bill",
    "CostSettings",
    "Line",
    "Prices",
    "Rates",
    "Share",
    "StorageComparison",
    "bill",
    "compare_storage",
    "resolve",
]
