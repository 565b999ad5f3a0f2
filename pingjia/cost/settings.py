"""The recipe section `cost:`. What an hour and a kilowatt-hour cost; reading a price file is `prices.py`'s."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pingjia.recipe import Section

Currency = Literal["CNY", "USD"]
PLACEHOLDER_PRICE_PER_HOUR = 1.0


class CostSettings(Section):
    """Prices of the machine that the ledger's work ran on.

    price_per_hour: rent or depreciation. The default is a placeholder of 1.00, so that an unpriced bill reads in
    hours of machine time; the bill says so. Given here it wins over the price file.
    electricity_price_per_kwh: added where the ledger holds measured energy, else for `power_w` over the time.
    price_file: a dated list of prices (`prices.py`); `hardware` names the entry. Without a price file `hardware` is
    only a label on the bill. `price_file: example` is the packaged list of placeholders.
    """

    price_per_hour: float = Field(default=PLACEHOLDER_PRICE_PER_HOUR, ge=0, allow_inf_nan=False)
    currency: Currency = "CNY"
    electricity_price_per_kwh: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    power_w: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    hardware: str = ""
    price_file: str | None = None
