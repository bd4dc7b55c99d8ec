"""A view and a store in, what so many entities take and cost there out: a sample of the view's own rows is encoded and measured.

Nothing of the view is written or changed. What is computed and not measured is named in the facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from materialize import codec, latest
from materialize.codec import entity_keys
from materialize.errors import OfflineStoreError
from materialize.model import to_us
from materialize.offline import live_rows, newest_commits, open_table, read_features, read_order, total_rows
from materialize.online.demand import SECONDS_A_DAY, Demand
from materialize.order import stamp

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from materialize.model import FeatureView, Prices
    from materialize.offline import DataFile, OfflineTable, OrderRows
    from materialize.online.base import EncodedBatch, OnlineStore

__all__ = ["Ask", "SizingReport", "rule_of_thumb", "size"]

#: Entities that are weighed, and data files that their features are read from.
SAMPLE, FILES = 1_000, 16
#: Rows whose keys are read: all of a table that has no more; else those of some files, and its rows count as entities.
COUNTED, LOOKED_AT = 10_000_000, 2_000_000
#: Days and commits of the log in which changes are counted, and the shortest time that tells something of a day.
DAYS, COMMITS, SHORTEST = 7, 2_000, timedelta(hours=1)
#: Bytes of a feature and the overhead by the common rule of thumb.
THUMB_BYTES, THUMB_FACTOR = 16, 1.5
#: Reads a second for which both stores are compared.
RATES = (10, 100, 1_000, 10_000)
RUNS_A_DAY = {"hourly": 24, "daily": 1}
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Ask:
    """What somebody wants to know; None: measured. ``node_price``: of one Redis server for a month, in the currency of ``prices``, which are those of
    DynamoDB; without prices nothing is compared.
    """

    entities: int | None = None
    changes_per_day: int | None = None
    reads_per_second: float = 100.0
    node_price: float | None = None
    prices: Prices | None = None


@dataclass(frozen=True, slots=True)
class SizingReport:
    """``measured``: what the store told (`OnlineStore.size`). ``compared``: Redis with DynamoDB on demand. The rest: what both rest on."""

    view: str
    store: str
    sample: int
    entities: int
    entities_are: str
    changes_per_day: int | None
    changes_are: str
    reads_per_second: float
    features: int
    rule_of_thumb: int
    of_rule_of_thumb: float | None
    measured: dict[str, Any]
    compared: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def rule_of_thumb(entities: int, features: int) -> int:
    """Bytes that are often said to be needed: entities x features x 16 B x 1.5."""
    return round(entities * features * THUMB_BYTES * THUMB_FACTOR)


def size(view: FeatureView, store: OnlineStore, store_name: str, ask: Ask, *, now: datetime) -> SizingReport:
    """Weigh a sample of the latest rows of *view* in *store*, and say what all its entities need.

    Raises OfflineStoreError when the table cannot be read or has no row that can be stored, UnavailableError when the store does not answer. Whatever
    happens, nothing of the sample is left in the store.
    """
    table = open_table(view)
    files = table.snapshot_files()
    rows = total_rows((file.rows, file.size) for file in files)
    whole = rows <= COUNTED
    order = read_order(table, files if whole else _some(files))
    valid, _ = latest.valid_rows(order.frame, view, now=now, max_key_bytes=store.max_key_bytes)
    winners = latest.unexpired(latest.newest(valid, view.join_keys), view, now)
    sample = _encoded(view, store, table, order, winners)
    entities, told = _entities(ask, files, winners.height if whole else None, rows)
    per_day, how = _changes(ask, view, table, entities, now)
    demand = Demand(entities, per_day, ask.reads_per_second)
    measured = store.size(view, sample, demand)
    thumb = rule_of_thumb(entities, len(view.features))
    total = measured.get("memory", measured.get("file"))
    if total is None and "storage_gigabytes" in measured:
        total = measured["storage_gigabytes"] * 1e9
    return SizingReport(
        view=view.name,
        store=store_name,
        sample=len(sample.keys),
        entities=entities,
        entities_are=told,
        changes_per_day=per_day,
        changes_are=how,
        reads_per_second=ask.reads_per_second,
        features=len(view.features),
        rule_of_thumb=thumb,
        of_rule_of_thumb=None if total is None else round(total / thumb, 3),
        measured=measured,
        compared=_compared(view, sample, demand, ask, measured),
    )


# --- the sample --------------------------------------------------------------------------------------------------------


def _some(files: Sequence[DataFile]) -> list[DataFile]:
    """Files from all over the table, with about `LOOKED_AT` rows."""
    chosen: list[DataFile] = []
    for place in np.random.default_rng(0).permutation(len(files)):
        chosen.append(files[place])
        if total_rows((file.rows, file.size) for file in chosen) >= LOOKED_AT:
            break
    return sorted(chosen, key=lambda file: file.uri)


def _encoded(
    view: FeatureView, store: OnlineStore, table: OfflineTable, order: OrderRows, winners: pl.DataFrame
) -> EncodedBatch:
    """Records of some of the *winners*, as a rebuild would write them."""
    of_file = np.searchsorted(np.cumsum(order.counts), winners["position"].to_numpy(), side="right")
    held = np.unique(of_file)
    near = held[np.linspace(0, len(held) - 1, min(len(held), FILES)).astype(np.int64)] if len(held) else held
    some = winners.filter(pl.Series(np.isin(of_file, near)))
    drawn = some.sample(min(SAMPLE, some.height), seed=0).sort("position")
    blocks = [features for _, features in read_features(table, order, drawn["position"])]
    if blocks:
        features = pl.concat(blocks, rechunk=True)  # with several chunks polars selects a literal as many times
        bad = codec.unstorable_rows(features, view, max_value_bytes=store.max_value_bytes)
        if bad is not None:
            drawn, features = drawn.filter(bad.is_null()), features.filter(bad.is_null())
    if not blocks or features.is_empty():
        raise OfflineStoreError(
            f"{table.subject}: could not size it: found no row at version {table.version} that can be stored and is not expired, expected some. "
            "Nothing was written. Look at: materialize quarantine list"
        )
    at = stamp(1, table.version)
    stamped = drawn.select("event_us", "created_us", version=pl.lit(at, pl.Int64))
    keys = entity_keys(drawn, view.join_keys)
    return codec.encode(keys, stamped, features, view, schema_id=1, floor=at)


# --- how many ----------------------------------------------------------------------------------------------------------


def _entities(ask: Ask, files: Sequence[DataFile], counted: int | None, rows: int) -> tuple[int, str]:
    """How many entities, and where the number is from."""
    if ask.entities is not None:
        return ask.entities, "given"
    if counted is not None:
        return counted, "counted: those with a row that can be stored and is not expired"
    live = live_rows(files)
    return (rows, "at most: rows by the size of the files") if live is None else (live, "at most: rows by the log")


def _changes(ask: Ask, view: FeatureView, table: OfflineTable, entities: int, now: datetime) -> tuple[int | None, str]:
    """Entities that runs write in a day, and where the number is from."""
    if ask.changes_per_day is not None:
        return ask.changes_per_day, "given"
    found = list(newest_commits(table, since_us=to_us(now - timedelta(days=DAYS)), most=COMMITS))
    # What came with the oldest commit came in the time before it.
    span = to_us(now) - found[-1].committed_us if found else 0
    counts = [commit.rows for commit in found[:-1]]
    if span < SHORTEST.total_seconds() * 1e6 or None in counts:
        return None, "unknown: the log tells too little of the last days; give --changes-per-day"
    days = span / 1e6 / SECONDS_A_DAY
    brought = sum(rows for rows in counts if rows is not None) / days
    # A run writes the latest row of each entity alone.
    most = entities * RUNS_A_DAY[view.schedule] if not view.on_commit else brought
    words = f"rows of the {len(counts):,} commits of the last {days:.1f} days"
    return round(min(brought, most)), words + (", at most each entity once a run" if brought > most else "")


# --- Redis beside DynamoDB ---------------------------------------------------------------------------------------------


def _compared(
    view: FeatureView, sample: EncodedBatch, demand: Demand, ask: Ask, measured: dict[str, Any]
) -> dict[str, Any]:
    """What DynamoDB on demand costs a month at some rates of reads, and so what the servers of Redis may cost."""
    if ask.prices is None:
        return {"comparison": "none: no DynamoDB store in online_stores.yaml has prices"}
    from materialize.online.dynamodb.sizing import Items, item_sizes, monthly  # noqa: PLC0415 - boto3 is slow to import
    from materialize.online.redis.sizing import estimated, sizing  # noqa: PLC0415 - as above

    expires = view.ttl is not None
    if "per_server" not in measured:
        weighed = estimated(sample, f"fs:{view.name}:", "this store is no Redis")
        measured = sizing(weighed, {}, demand, expires=expires, slots=None)
    prices, servers, ram = ask.prices, measured["servers"], measured["per_server"]["ram"]
    items = Items.of(item_sizes(sample, shared_view=None, expires=expires))
    price = None if ask.node_price is None else ask.node_price * servers
    table = []
    for rate in sorted({*RATES, ask.reads_per_second}):
        month, strong = (monthly(items, demand, prices, rate, strong=how) for how in (False, True))
        line: dict[str, Any] = {"reads_per_second": rate, "eventual": round(month, 2), "strong": round(strong, 2)}
        line["a_server_below"] = round(month / servers, 2)
        if price is not None:
            line["cheaper"] = "redis" if price < month else "dynamodb"
        table.append(line)
    facts: dict[str, Any] = {
        "currency": prices.currency,
        "servers": servers,
        "server_gigabytes": round(ram / GIB, 2),
        "server_memory_is": measured["how"],
        "dynamodb_writes_per_day": demand.changes_per_day,
        "dynamodb_month": table,
    }
    if prices.gigabyte_month is None:
        facts["without"] = "storage: the prices have no gigabyte_month"
    if price is not None:
        fixed = monthly(items, demand, prices, 0.0)
        a_read = monthly(items, demand, prices, 1.0) - fixed
        facts["break_even_reads_per_second"] = max(0.0, round((price - fixed) / a_read, 1)) if a_read else None
    return facts
