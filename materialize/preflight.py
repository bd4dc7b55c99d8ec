"""A plan and the store's memory in, a refusal with figures out when the run cannot fit."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING

from materialize import latest
from materialize.entity_key import entity_keys
from materialize.errors import OnlineStoreError
from materialize.model import Watermark
from materialize.offline import changes_since, open_table, read_difference, read_features, read_order
from materialize.online.base import HEADER
from materialize.retry import with_retry

if TYPE_CHECKING:
    import polars as pl

    from materialize.evidence import Facts
    from materialize.model import FeatureView
    from materialize.offline import OfflineTable, OrderRows
    from materialize.online.base import OnlineStore
    from materialize.plan import Plan

__all__ = ["check_memory", "record_bytes"]

#: Rows below which a run is not worth a look at the store's memory.
SMALL_RUN = 1_000
#: Entities that are looked up to tell how many of a run's are new, and records whose memory is asked for.
LOOKED_UP, WEIGHED = 1_000, 20
#: Bytes that a server needs per key beside key and value: entry and pointers of two tables, string headers, rounding by malloc.
#: An estimate, not measured; records that are there are weighed instead.
OVERHEAD = 80
#: Bytes of a value of variable size where nothing is known of it, and of a key's prefix.
UNKNOWN, PREFIX = 16, 8


def check_memory(view: FeatureView, store: OnlineStore, plan: Plan, facts: Facts) -> None:
    """Raise OnlineStoreError when the records that a run adds need more memory than the store has free.

    Cheap where all rows would fit. Else the run's keys are read, as the run itself does, to count entities instead of rows, and
    some are looked up to tell how many are new. Writes nothing.
    """
    if plan.rows < SMALL_RUN or not all(one.maxmemory for one in facts.values()):
        return
    free = sum(max(one.maxmemory - one.used, 0) for one in facts.values())
    table = open_table(view, plan.to_version)
    if plan.rows * record_bytes(view, key_bytes=UNKNOWN, variable_bytes=table.size / plan.rows) < free:
        return
    rows = _rows(plan, table)
    known = latest.valid_entities(rows.frame, view.join_keys, store.max_key_bytes)
    entities = latest.distinct(known, view.join_keys)
    if entities.is_empty():
        return
    some = entities.sample(min(LOOKED_UP, entities.height), seed=0)
    keys = entity_keys(some, view.join_keys).to_list()
    held = with_retry(partial(store.read, view.name, keys))
    there = [key for key, record in zip(keys, held, strict=True) if record is not None]
    new = entities.height * (len(keys) - len(there)) // len(keys)
    each = with_retry(partial(store.record_bytes, view.name, there[:WEIGHED])) if there else None
    if each is None:
        key_bytes = sum(map(len, keys)) / len(keys)
        each = record_bytes(view, key_bytes=key_bytes, variable_bytes=_variable_bytes(view, table, rows, some))
    if new * each <= free:
        return
    maxmemory, used = sum(one.maxmemory for one in facts.values()), sum(one.used for one in facts.values())
    raise OnlineStoreError(
        f"feature view {view.name!r}: could not begin to write to {store.location}: found about {new:,} new entities of {plan.rows:,} rows, "
        f"which need about {round(new * each):,} bytes ({round(each):,} each), expected at most {free:,} bytes, which are free "
        f"({used:,} of maxmemory {maxmemory:,} are used). Nothing was written. Give the store more memory, or a ttl to the view; "
        "--force begins all the same"
    )


def record_bytes(view: FeatureView, *, key_bytes: float, variable_bytes: float) -> float:
    """About the memory of one record, bytes. *variable_bytes*: of all values of variable size together."""
    variable = sum(kind.width is None for kind in view.features.values())
    fixed = sum(kind.width or 4 for kind in view.features.values())
    body = HEADER.size + fixed + (max(variable_bytes, UNKNOWN * variable) if variable else 0)
    return OVERHEAD + PREFIX + len(view.name) + key_bytes + body


def _rows(plan: Plan, table: OfflineTable) -> OrderRows:
    """Keys and order of the rows that the run may bring."""
    if not plan.reads_changes:
        return read_order(table, table.snapshot_files(plan.interval))
    assert plan.watermark is not None  # noqa: S101 - the planner reads changes only after a watermark
    return read_difference(table, changes_since(table, Watermark.from_json(plan.watermark))).added


def _variable_bytes(view: FeatureView, table: OfflineTable, rows: OrderRows, some: pl.DataFrame) -> float:
    """The mean bytes of the values of variable size of some rows."""
    names = [name for name, kind in view.features.items() if kind.width is None]
    drawn = latest.positions_of(rows.frame, some, view.join_keys)
    sizes = [
        (block.select(names).estimated_size(), block.height)
        for _, block in itertools.islice(read_features(table, rows, drawn), 1)
    ]
    return sum(size for size, _ in sizes) / max(sum(height for _, height in sizes), 1) if names else 0.0
