"""Records in, what DynamoDB stores and bills for as many of them out. Pure arithmetic: nothing is asked or written.

Rules: https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/CapacityUnitCalculations.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from materialize.online.base import HEADER, LEAD_BYTES
from materialize.online.demand import DAYS_A_MONTH, SECONDS_A_DAY, Demand
from materialize.online.dynamodb.items import UNIT_BYTES

if TYPE_CHECKING:
    import numpy.typing as npt

    from materialize.model import Prices
    from materialize.online.base import EncodedBatch

__all__ = ["Items", "item_sizes", "monthly", "sizing"]

#: Bytes of an item that one read unit pays for.
READ_UNIT_BYTES = 4_096
#: Bytes of index that are billed as storage for each item, by the same page of rules.
INDEX_BYTES = 100
#: Bytes of the names of key, record and four numbers; of the expiry and of the view, where an item has them.
NAMES, NAME = 6, 1
#: Bytes of the number of an expiry: ten digits of seconds.
EXPIRY_BYTES = 6
#: As `cost` counts them, and AWS's price list.
GIGABYTE = 10**9


@dataclass(frozen=True, slots=True)
class Items:
    """What an item takes in the mean of a sample: bytes, units to write it, units to read it strongly consistent; twice what an
    eventually consistent read takes.
    """

    bytes: float
    write_units: float
    read_units: float

    @classmethod
    def of(cls, sizes: npt.NDArray[np.int64]) -> Items:
        """*sizes*: bytes of each item, at least one."""
        return cls(
            float(sizes.mean()), float((-(-sizes // UNIT_BYTES)).mean()), float((-(-sizes // READ_UNIT_BYTES)).mean())
        )


def item_sizes(batch: EncodedBatch, *, shared_view: str | None, expires: bool) -> npt.NDArray[np.int64]:
    """The bytes of each record of *batch* as an item. *shared_view*: its name, where a table has items of several views.

    Returns: int64, one for each row. A number takes one byte for every two significant digits and one more; one less than the true
    size is possible, because AWS calls its own rule approximate.
    """
    record = pc.binary_length(batch.values).to_numpy(zero_copy_only=False).astype(np.int64) - (HEADER.size - LEAD_BYTES)
    keys = pc.binary_length(batch.keys).to_numpy(zero_copy_only=False).astype(np.int64)
    numbers = _number_bytes(batch.event_us) + _number_bytes(batch.created_us)
    # A record that was ever part of a rebuild has a floor like its version.
    numbers += 2 * _number_bytes(batch.version)
    other = NAMES + (EXPIRY_BYTES + NAME if expires else 0)
    other += len(shared_view.encode()) + NAME if shared_view is not None else 0
    sizes: npt.NDArray[np.int64] = record + keys + numbers + other
    return sizes


def _number_bytes(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Zeros at the end of a number take nothing, a sign takes one byte."""
    left, digits = np.abs(values), np.ones(len(values), dtype=np.int64)
    while (trailing := (left % 10 == 0) & (left != 0)).any():
        left = np.where(trailing, left // 10, left)
    rest = left // 10
    while rest.any():
        digits, rest = digits + (rest > 0), rest // 10
    return (digits + 1) // 2 + 1 + (values < 0)


def sizing(items: Items, demand: Demand, prices: Prices | None) -> dict[str, Any]:
    """Storage, units and, with *prices*, money of *demand*, as facts for people."""
    stored = demand.entities * (items.bytes + INDEX_BYTES) / GIGABYTE
    reads = demand.reads_per_second * SECONDS_A_DAY * DAYS_A_MONTH
    facts: dict[str, Any] = {
        "item_bytes": round(items.bytes, 1),
        "index_bytes": INDEX_BYTES,
        "storage_gigabytes": round(stored, 3),
        "write_units_each": round(items.write_units, 3),
        "read_units_each": {"eventual": round(items.read_units / 2, 3), "strong": round(items.read_units, 3)},
        "first_load_write_units": round(demand.entities * items.write_units),
        "day_write_units": None
        if demand.changes_per_day is None
        else round(demand.changes_per_day * items.write_units),
        "month_read_units": {
            "eventual": round(reads * items.read_units / 2),
            "strong": round(reads * items.read_units),
        },
    }
    if prices is None:
        return facts | {"cost": "units only: the store has no prices in online_stores.yaml"}
    writes = prices.million_write_units / 1e6
    cost = {
        "currency": prices.currency,
        "prices_of": prices.as_of.isoformat(),
        "first_load": round(facts["first_load_write_units"] * writes, 2),
        "day_of_writes": None if demand.changes_per_day is None else round(facts["day_write_units"] * writes, 2),
        "month_of_storage": None if prices.gigabyte_month is None else round(stored * prices.gigabyte_month, 2),
        "month_of_reads": {
            how: round(units * prices.million_read_units / 1e6, 2) for how, units in facts["month_read_units"].items()
        },
    }
    return facts | {"cost": cost}


def monthly(items: Items, demand: Demand, prices: Prices, reads_per_second: float, *, strong: bool = False) -> float:
    """What a month on demand costs: storage (where it has a price), the writes of *demand*, and so many reads."""
    stored = demand.entities * (items.bytes + INDEX_BYTES) / GIGABYTE * (prices.gigabyte_month or 0.0)
    writes = (demand.changes_per_day or 0) * DAYS_A_MONTH * items.write_units * prices.million_write_units / 1e6
    units = reads_per_second * SECONDS_A_DAY * DAYS_A_MONTH * items.read_units / (1 if strong else 2)
    return stored + writes + units * prices.million_read_units / 1e6
