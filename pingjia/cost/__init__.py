"""Ledger and prices -> money. Arithmetic only; imports nothing but the base, and no torch."""

from pingjia.cost.bill import Bill, Line, Rates, Share, bill
from pingjia.cost.calculator import Assumptions, Estimate, estimate
from pingjia.cost.parts import Part, breakdown
from pingjia.cost.prices import EXAMPLE_PRICES, Prices, resolve
from pingjia.cost.settings import CostSettings
from pingjia.cost.storage import StorageComparison, compare_storage

__all__ = [
    "EXAMPLE_PRICES",
    "Assumptions",
    "Bill",
    "CostSettings",
    "Estimate",
    "Line",
    "Part",
    "Prices",
    "Rates",
    "Share",
    "StorageComparison",
    "bill",
    "breakdown",
    "compare_storage",
    "estimate",
    "resolve",
]
