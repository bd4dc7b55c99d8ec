"""A plan and the store's memory in, a refusal with figures out when the run cannot fit."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from materialize.errors import OnlineStoreError
from materialize.memory import shares_compared
from materialize.model import Watermark
from materialize.offline import changes_since, open_table, total_rows
from materialize.online.base import HEADER
from materialize.retry import with_retry

if TYPE_CHECKING:
    import polars as pl

    from materialize.evidence import Facts
    from materialize.model import FeatureView
    from materialize.offline import OfflineTable
    from materialize.online.base import OnlineStore
    from materialize.plan import Plan

__all__ = ["check_memory", "field_bytes", "record_bytes"]

#: Rows below which a run is not worth a look at the store's memory.
SMALL_RUN = 1_000
#: Entities that are looked up to tell how many of a run's are new, and records whose memory is asked for.
LOOKED_UP, WEIGHED = 1_000, 20
#: Bytes that a server needs per key beside key and value: entries of two tables, string headers, rounding by malloc.
#: Measured by tests/test_preflight.py; records that are there are weighed instead.
OVERHEAD = 64
#: Bytes that a server needs per field of a hash beside its name and text, and of the text for each byte of a value of fixed size: 18 for
#: a float64. Measured by tests/test_preflight.py.
FIELD_OVERHEAD, TEXT_PER_BYTE = 60, 2.25
#: Bytes of a value of variable size where nothing is known of it, and of a key's prefix.
UNKNOWN, PREFIX = 16, 8


def check_memory(view: FeatureView, store: OnlineStore, plan: Plan, facts: Facts) -> None:
    """Raise OnlineStoreError when the records that a run adds need more memory than the store has free.

    Cheap where all rows would fit. Else the run's keys are read, as the run itself does, to count entities of a share instead of rows, and
    some are looked up to tell how many are new. Writes nothing.
    """
    free = sum(one.free for one in facts.values())
    if plan.rows < SMALL_RUN or math.isinf(free):
        return
    table = open_table(view, plan.to_version)
    files = table.snapshot_files()
    # Values of variable size take in the store about what the whole row takes in the files, where it is compressed.
    row_bytes = sum(file.size for file in files) / max(total_rows((file.rows, file.size) for file in files), 1)
    each = record_bytes(view, variable_bytes=row_bytes)
    if store.layout(view.name) == "hash":
        each += field_bytes(view, variable_bytes=row_bytes)
    if plan.rows * each <= free:
        return
    from materialize.codec import entity_keys

    entities, shares = _entities(view, store, plan, table)
    some = entity_keys(entities.sample(min(LOOKED_UP, entities.height), seed=0), view.join_keys).to_list()
    held = with_retry(partial(store.read, view.name, some))
    there = [key for key, record in zip(some, held, strict=True) if record is not None]
    new = shares * entities.height * (len(some) - len(there)) // max(len(some), 1)
    each = with_retry(partial(store.record_bytes, view.name, there[:WEIGHED])) or each
    if new * each <= free:
        return
    maxmemory, used = sum(one.maxmemory for one in facts.values()), sum(one.used for one in facts.values())
    raise OnlineStoreError(
        f"feature view {view.name!r}: could not begin to write to {store.location}: found about {new:,} new entities of {plan.rows:,} rows, "
        f"which need about {round(new * each):,} bytes ({round(each):,} each), expected at most {free:,} bytes, which are free "
        f"({used:,} of maxmemory {maxmemory:,} are used). Nothing was written. Give the store more memory, or a ttl to the view; "
        "--force begins all the same"
    )


def record_bytes(view: FeatureView, *, variable_bytes: float) -> float:
    """About the memory of one record, bytes. *variable_bytes*: of all values of variable size together, and of the key."""
    variable = sum(kind.width is None for kind in view.features.values())
    fixed = sum(kind.width or 4 for kind in view.features.values())
    body = HEADER.size + fixed + (max(variable_bytes, UNKNOWN * variable) if variable else 0)
    return OVERHEAD + PREFIX + len(view.name) + UNKNOWN * len(view.join_keys) + body


def field_bytes(view: FeatureView, *, variable_bytes: float) -> float:
    """About the memory of the fields of one entity beside its record, in the layout `hash`; bytes. *variable_bytes*: as above."""
    names = sum(FIELD_OVERHEAD + len(name) for name in view.features)
    texts = sum(TEXT_PER_BYTE * (kind.width or 0) for kind in view.features.values())
    variable = any(kind.width is None for kind in view.features.values())
    return names + texts + variable_bytes * variable


def _entities(view: FeatureView, store: OnlineStore, plan: Plan, table: OfflineTable) -> tuple[pl.DataFrame, int]:
    """Entities that the run may bring: the join keys of those of one share of all, each once, and how many shares there are."""
    from materialize import latest
    from materialize.offline import appended_files, read_difference, read_parts

    files = None if plan.reads_changes else table.snapshot_files(plan.interval)
    if files is None:
        assert plan.watermark is not None  # noqa: S101 - the planner reads changes only after a watermark
        changes = changes_since(table, Watermark.from_json(plan.watermark))
        if any(change.removes for change in changes):  # the planner saw that what they brought can be held
            found = read_difference(
                table, changes, lambda rows: latest.shards(view.join_keys, shares_compared(rows, plan.rows_held))
            )
            rows = latest.valid_entities(found.added.frame, view.join_keys, store.max_key_bytes)
            return latest.distinct(rows, view.join_keys), 1
        files = appended_files(table, changes)
    shares = plan.pieces * plan.shares
    some: list[pl.DataFrame] = []
    for part in read_parts(table, files):
        rows = latest.valid_entities(part.frame, view.join_keys, store.max_key_bytes)
        some.append(latest.distinct(latest.shard(rows, view.join_keys, part=0, parts=shares), view.join_keys))
    return latest.distinct(latest.joined(some), view.join_keys), shares
