"""Quarantined rows in, their entities read again from the source out: what can be stored now is online and leaves the quarantine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl

from materialize import watermark
from materialize.codec import entity_keys
from materialize.lease import held_by
from materialize.offline import Quarantine, held_rows, mark_released
from materialize.order import ERASED, stamp
from materialize.piece import Snapshot
from materialize.refused import held
from materialize.retry import with_retry
from materialize.verify import plan_comparison

if TYPE_CHECKING:
    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore
    from materialize.pipeline import Run
    from materialize.plan import Plan
    from materialize.refused import Held

__all__ = ["ReleaseReport", "release"]


@dataclass(frozen=True, slots=True)
class ReleaseReport:
    """What became of the chosen rows of the quarantine: ``released + held + waiting`` of them.

    ``version``: of the table, where the watermark is. ``released``: marked so, because the source has the row no more, or it can be
    stored, or a newer row of its entity can. ``held``: still cannot be stored, ``reasons`` says why. ``waiting``: came after the
    watermark's version, or a run that did not finish wrote their entity; for a release after the next run. ``written``: entities
    with a released row that were written as the source has them.
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
    row of each replaces what is online, unless a newer run wrote that. After it returns, rows that still cannot be stored wait in
    quarantine, and the others are marked as released. If it raises, any subset is online, and each of the rows still waits; doing it
    again is harmless.

    Raises OnlineStoreError when the view never loaded, or was changed since, or its rebuild is under way; OfflineStoreError when
    the table or its quarantine cannot be read or written; WatermarkError when another run moved the watermark meanwhile; BusyError
    when another run holds the view.
    """
    with held_by(run, store, view.name, "release") as holding:
        return _released(view, store, holding, reason, met_by)


def _released(view: FeatureView, store: OnlineStore, run: Run, reason: str | None, met_by: str | None) -> ReleaseReport:
    started = time.monotonic()
    plan = plan_comparison(view, store, store_name=run.store_name, run_id=run.run_id)
    chosen = held_rows(view, run.store_name)
    if reason is not None:
        chosen = chosen.filter(pl.col("reason").str.contains(reason, literal=True))
    if met_by is not None:
        chosen = chosen.filter(run_id=met_by)
    online = held(store, view.name, chosen["entity"].drop_nulls().unique().to_list())
    later = _later(plan, chosen, online)
    tried = chosen.join(later, on="id", how="anti")
    still, written = (tried, 0) if tried.is_empty() else _tried(view, store, run, plan, tried, online)
    gone = tried.join(still, on="id", how="anti")["id"]
    mark_released(view, run.store_name, gone, run_id=run.run_id, now=run.now())
    counted = still.join(tried, on="id", how="semi")["reason"].value_counts()
    return ReleaseReport(
        view=view.name,
        store=run.store_name,
        version=plan.to_version,
        released=len(gone),
        held=tried.height - len(gone),
        waiting=later.height,
        written=written,
        seconds=time.monotonic() - started,
        run_id=run.run_id,
        reasons=dict(sorted(zip(counted["reason"], counted["count"], strict=True))),
    )


def _later(plan: Plan, rows: pl.DataFrame, online: dict[str, Held]) -> pl.DataFrame:
    """Those of *rows* that cannot be tried at the plan's version: they came after it, or their entity has the floor of that version
    and a newer row on top, which could only be replaced, and would come back with the next run.
    """
    at = stamp(plan.generation, plan.to_version)
    ahead = [entity for entity, head in online.items() if head.version > at and at <= head.floor < ERASED]
    # A row of a table that was dropped and created again is gone, whatever its version was.
    came = pl.coalesce("commit_version", "table_version")
    newer = (pl.col("table_id") == plan.table_id) & (came > plan.to_version)
    return rows.filter(newer | pl.col("entity").is_in(ahead).fill_null(value=False))


def _tried(
    view: FeatureView, store: OnlineStore, run: Run, plan: Plan, rows: pl.DataFrame, online: dict[str, Held]
) -> tuple[pl.DataFrame, int]:
    """Write the entities of *rows* that have one to be released, as the source has them. Returns: the rows of all these entities that
    still cannot be stored, each once, which are kept; and how many entities were written.
    """
    snapshot = Snapshot(view, store, plan, run.now())
    # Rows without an entity are all looked at: only their own keys tell whether they can be stored.
    for _ in snapshot.records(_of(snapshot, view, rows["entity"])):
        pass  # what cannot be stored comes out on the way
    still = pl.concat([rows.clear(), *snapshot.refused()]).unique("id", keep="last")
    erased = [entity for entity, head in online.items() if head.floor >= ERASED]
    still = still.filter(~pl.col("entity").is_in(erased).fill_null(value=False))
    Quarantine(view, run.store_name).keep(still)
    free = rows.join(still, on="id", how="anti")["entity"].drop_nulls()
    if free.is_empty():
        return still, 0
    plan = replace(plan, schema_id=with_retry(partial(watermark.register_schema, store, view)))
    snapshot = snapshot.planned(plan)
    at = stamp(plan.generation, plan.to_version)
    if any(at <= online[entity].floor < ERASED for entity in free if entity in online):
        snapshot = snapshot.in_new_generation()
    return still, snapshot.write(_of(snapshot, view, free), run.progress)


def _of(snapshot: Snapshot, view: FeatureView, entities: pl.Series) -> pl.DataFrame:
    """The rows of *entities* in the source; null stands for rows without a key."""
    every = snapshot.rows.frame
    named = every.with_columns(entity_keys(every, view.join_keys).cast(pl.String).alias("__entity"))
    wanted = entities.unique().alias("__entity").to_frame()
    return named.join(wanted, on="__entity", how="semi", nulls_equal=True).drop("__entity").sort("position")
