"""A run in, its write units, minutes and price out, before it is begun."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from materialize.online.base import typical_bytes
from materialize.online.dynamodb.items import OTHER_BYTES, UNIT_BYTES

if TYPE_CHECKING:
    from materialize.model import FeatureView, Mode, Prices

__all__ = ["estimate"]

#: Bytes of a scan that are one read unit.
READ_BYTES = 4_096
#: How most rows of a run begin, as `load.Met` will find.
WAYS = {
    "incremental": "conditional updates, inserts where most entities are new",
    "rebuild": "conditional updates, inserts where most entities are new",
    "backfill": "reads, conditional updates of what is older",
}


def estimate(
    view: FeatureView, rows: int, mode: Mode | Literal["verify"], rate: float, prices: Prices | None, *, first: bool
) -> dict[str, Any]:
    """Upper bounds: every row is another entity, and every one is written. *rate*: write units a second."""
    item = typical_bytes(view) + OTHER_BYTES
    if mode == "verify":
        units = -(-rows * item // READ_BYTES)
        facts: dict[str, Any] = {"way": "a consistent scan of the table", "read_units": units}
        if prices is not None:
            facts["cost"] = _money(units * prices.million_read_units / 1e6, prices)
        return facts
    units = rows * -(-item // UNIT_BYTES)
    reads = rows if mode == "backfill" else 0
    facts = {
        "way": WAYS[mode],
        "write_units": units,
        "read_units": reads,
        "minutes": round(units / rate / 60, 1),
        "write_units_a_second": rate,
    }
    if prices is not None:
        cost = (units * prices.million_write_units + reads * prices.million_read_units) / 1e6
        facts["cost"] = _money(cost, prices)
    if first:
        size = rows * item / 1e9
        facts["instead"] = f"materialize bulk-load {view.name} s3://BUCKET/PREFIX, {size:,.2f} GB of items"
        if prices is not None and prices.bulk_gigabyte is not None:
            # every row is read back afterwards
            facts["instead"] += ", " + _money(
                size * prices.bulk_gigabyte + rows * prices.million_read_units / 1e6, prices
            )
    return facts


def _money(cost: float, prices: Prices) -> str:
    return f"{cost:,.2f} {prices.currency} by the prices of {prices.as_of.isoformat()}"
