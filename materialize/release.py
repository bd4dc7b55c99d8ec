"""Quarantined rows in, their entities read again from the source out: what can be stored now is online and leaves the quarantine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl

from materialize import decoder, watermark
from materialize.entity_key import entity_keys
from materialize.model import Watermark
from materialize.offline import Quarantine, drop_rows, held_rows
from materialize.order import WRITTEN, stamp
from materialize.piece import Snapshot
from materialize.retry import with_retry
from materialize.verify import plan_comparison
from materialize.writer import Writer

if TYPE_CHECKING:
    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore
    from materialize.pipeline import Run
    from materialize.plan import Plan

__all__ = ["ReleaseReport", "release"]

#: Entities of one read.
AT_ONCE = 10_000


@dataclass(frozen=True, slots=True)
class ReleaseReport:
    """What became of the chosen rows of the quarantine: ``released + held + waiting`` of them.

    ``version``: of the table, where the watermark is. ``released``: taken out, because the source has the row no more, or it can be
    stored, or a newer row of its entity can. ``held``: still cannot be stored, ``reasons`` says why. ``waiting``: came after the
    watermark's version, for the next run to try. ``written``: entities of which readers see something else now.
    """

    view: str
    store: str
    version: int
    released: int
    held: int
    waiting: int
    written: int
    seconds: float
    run_id: str
    reasons: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def release(
    view: FeatureView, store: OnlineStore, run: Run, *, reason: str | None = None, met_by: str | None = None
) -> ReleaseReport:
    """Try quarantined rows of *view* again: those with *reason* in their reason, those that the run *met_by* met, or all.

    The source decides, not the copy: the entities of these rows are read from it at the watermark's version, and the latest storable
    row of each replaces what is online, unless a newer run wrote that. After it returns, rows that still cannot be stored are in
    quarantine, and the others are not. If it raises, any subset is online, and each of the rows is still in quarantine.

    Raises OnlineStoreError when the view never loaded, or was changed since, or its rebuild is under way; OfflineStoreError when
    the table or its quarantine cannot be read or written.
    """
    started = time.monotonic()
    plan = plan_comparison(view, store, store_name=run.store_name, run_id=run.run_id)
    chosen = held_rows(view, run.store_name)
    if reason is not None:
        chosen = chosen.filter(pl.col("reason").str.contains(reason, literal=True))
    if met_by is not None:
        chosen = chosen.filter(run_id=met_by)
    # A row of a table that was dropped and created again is gone, whatever its version was.
    came = pl.coalesce("commit_version", "table_version")
    later = chosen.filter(pl.col("table_id") == plan.table_id, came > plan.to_version)
    tried = chosen.join(later, on="id", how="anti")
    still, written = _tried(view, store, run, plan, tried) if tried.height else (tried.clear(), 0)
    held = tried.join(still, on="id", how="semi")
    drop_rows(view, run.store_name, tried.join(still, on="id", how="anti")["id"])
    counted = still.join(tried, on="id", how="semi")["reason"].value_counts()
    return ReleaseReport(
        view=view.name,
        store=run.store_name,
        version=plan.to_version,
        released=tried.height - held.height,
        held=held.height,
        waiting=later.height,
        written=written,
        seconds=time.monotonic() - started,
        run_id=run.run_id,
        reasons=dict(sorted(zip(counted["reason"], counted["count"], strict=True))),
    )


def _tried(view: FeatureView, store: OnlineStore, run: Run, plan: Plan, rows: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Write the entities of *rows* as the source has them. Returns: the rows of these that still cannot be stored, each once; entities written."""
    keys = rows["entity"].drop_nulls().unique().cast(pl.Binary).to_list()
    plan = _above_floors(
        view, store, replace(plan, schema_id=with_retry(partial(watermark.register_schema, store, view))), keys
    )
    snapshot = Snapshot(view, store, plan, run.now())
    every = snapshot.rows.frame
    named = every.with_columns(entity_keys(every, view.join_keys).cast(pl.String).alias("__entity"))
    # Rows without an entity are all looked at: only their own keys tell whether they can be stored.
    wanted = rows.select(__entity="entity").unique()
    some = named.join(wanted, on="__entity", how="semi", nulls_equal=True).drop("__entity").sort("position")
    with Writer(store, run.progress) as writer:
        for batch, write in snapshot.records(some):
            writer.submit(batch, write)
    quarantine, still = Quarantine(view, run.store_name), [rows.clear()]
    for refused in snapshot.refused():
        quarantine.keep(refused)
        still.append(refused)
    return pl.concat(still).unique("id", keep="last"), int(writer.outcomes[WRITTEN])


def _above_floors(view: FeatureView, store: OnlineStore, plan: Plan, keys: list[bytes]) -> Plan:
    """*plan* so that the store takes the entities of *keys* at its version: a record with that snapshot's floor refuses to be written
    again, except in a new generation. A run that began in the old one can no longer move the watermark, and the next brings its rows.
    """
    at = stamp(plan.generation, plan.to_version)
    for low in range(0, len(keys), AT_ONCE):
        found = with_retry(partial(store.read, view.name, keys[low : low + AT_ONCE]))
        if (decoder.headers([record for record in found if record is not None])["floor"] >= at).any():
            break
    else:
        return plan
    assert plan.watermark is not None  # noqa: S101 - there is nothing to compare with without one
    mark = Watermark.from_json(plan.watermark)
    moved = replace(mark, generation=mark.generation + 1, run_id=plan.run_id)
    text = with_retry(partial(watermark.move, store, view.name, plan.watermark, moved))
    return replace(plan, generation=moved.generation, watermark=text)
