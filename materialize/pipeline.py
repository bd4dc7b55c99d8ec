"""The whole story of a run: plan, begin, write the pieces, commit. Airflow and the CLI call these same functions.

A crash anywhere before `commit` has moved the watermark means: do it again, harmlessly.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from materialize import codec, latest, watermark
from materialize.errors import MaterializeError, RebuildNeeded
from materialize.model import COUNTERS, RunReport, Watermark, to_us
from materialize.offline import open_table, total_rows
from materialize.order import GENERATION, NO_FLOOR, WRITTEN, stamp
from materialize.plan import Plan, choose_path, cut, piece_count
from materialize.retry import with_retry
from materialize.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime

    from materialize.model import FeatureView, Interval, Mode
    from materialize.offline import DataFile, OfflineTable, RowCounts
    from materialize.online.base import EncodedBatch, OnlineStore, Outcomes

__all__ = ["PieceReport", "Run", "backfill", "begin", "commit", "incremental", "make_plan", "rebuild", "write_piece"]

log = logging.getLogger(__name__)

#: Bytes of records per write call: large enough to hide a round trip, small enough to overlap encoding with sending.
BATCH_BYTES = 8 * 2**20
#: Pieces hash entities with polars, whose hashes may differ between versions.
ENGINE = f"polars {pl.__version__}"


@dataclass(frozen=True, slots=True)
class PieceReport:
    """What one piece of a run did; the counters of RunReport. ``event_us``: greatest event time read."""

    rows_read: int = 0
    entities: int = 0
    written: int = 0
    stale: int = 0
    unchanged: int = 0
    expired: int = 0
    quarantined: int = 0
    bytes: int = 0
    seconds: float = 0.0
    event_us: int | None = None
    quarantine_reasons: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PieceReport:
        return cls(**values)


def no_progress(_entities: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True, slots=True)
class Run:
    """Who runs: the store's name in the config, an id for reports and the watermark, a clock in UTC, and who watches.

    ``progress`` is called with the number of entities that each finished write call handled.
    """

    store_name: str
    run_id: str
    now: Callable[[], datetime]
    progress: Callable[[int], None] = no_progress


# --- the three runs ----------------------------------------------------------------------------------------------------


def incremental(view: FeatureView, store: OnlineStore, run: Run) -> RunReport:
    """Bring everything between the watermark and the table's head online; the first time, the whole snapshot.

    After it returns, each entity online equals its latest storable row at the report's ``to_version``.
    """
    plan = begin(view, store, make_plan(view, store, mode="incremental", store_name=run.store_name, run_id=run.run_id))
    pieces = [write_piece(view, store, plan, piece, now=run.now(), progress=run.progress) for piece in range(plan.pieces)]
    return commit(view, store, plan, pieces, now=run.now())


def backfill(view: FeatureView, store: OnlineStore, run: Run, interval: Interval) -> RunReport:
    """Merge the rows of an event-time interval at the current version. Older than what is stored loses; the watermark stays."""
    plan = begin(view, store, make_plan(view, store, mode="backfill", store_name=run.store_name, run_id=run.run_id, interval=interval))
    pieces = [write_piece(view, store, plan, piece, now=run.now(), progress=run.progress) for piece in range(plan.pieces)]
    return commit(view, store, plan, pieces, now=run.now())


def rebuild(view: FeatureView, store: OnlineStore, run: Run) -> RunReport:
    """Replace everything online by the snapshot at the table's head, whatever the store holds, and remove what it does not."""
    plan = begin(view, store, make_plan(view, store, mode="rebuild", store_name=run.store_name, run_id=run.run_id))
    pieces = [write_piece(view, store, plan, piece, now=run.now(), progress=run.progress) for piece in range(plan.pieces)]
    return commit(view, store, plan, pieces, now=run.now())


# --- their steps -------------------------------------------------------------------------------------------------------


def make_plan(view: FeatureView, store: OnlineStore, *, mode: Mode, store_name: str, run_id: str, interval: Interval | None = None) -> Plan:
    """What a run would do, with the table pinned at its head. Writes nothing anywhere.

    Raises RebuildNeeded when an incremental run cannot be exact, OfflineStoreError when the table cannot be read.
    """
    table = open_table(view)
    text = with_retry(partial(watermark.read_text, store, view.name))
    found = None if text is None else Watermark.from_json(text)
    path = choose_path(view, mode, found, table.table_id)
    files = _files(table, snapshot=path.snapshot, mode=mode, interval=interval, text=text)
    rows = total_rows(files)
    return Plan(
        view=view.name,
        store=store_name,
        mode=mode,
        run_id=run_id,
        table_id=table.table_id,
        from_version=None if path.snapshot or found is None else found.version,
        to_version=table.version,
        generation=path.generation,
        snapshot=path.snapshot,
        pieces=piece_count(rows, files=None if path.snapshot else len(files)),
        rows=rows,
        reason=path.reason,
        engine=ENGINE,
        interval=interval,
        watermark=text,
    )


def begin(view: FeatureView, store: OnlineStore, plan: Plan) -> Plan:
    """Make the view's schema known to readers and, for a snapshot run, claim its generation in the watermark.

    After it, an older run of the view can write (harmlessly) but no longer move the watermark past a snapshot run. A crash
    leaves the watermark without a version: the next incremental run does the snapshot.
    """
    schema_id = with_retry(partial(watermark.register_schema, store, view)) if plan.pieces else 0
    if not plan.snapshot:
        return replace(plan, schema_id=schema_id)
    # Without a watermark the store should be empty. Records there were left by an unknown past, so ours must win.
    highest = None if plan.watermark else _highest_version(view, store)
    generation = plan.generation if highest is None else highest // GENERATION + 1
    claim = Watermark(generation=generation, table_id=plan.table_id, version=None, schema=view.schema_text, run_id=plan.run_id)
    text = with_retry(partial(watermark.move, store, view.name, plan.watermark, claim))
    sweep = plan.watermark is not None or highest is not None
    return replace(plan, schema_id=schema_id, generation=generation, watermark=text, sweep=sweep)


def write_piece(
    view: FeatureView, store: OnlineStore, plan: Plan, piece: int, *, now: datetime, progress: Callable[[int], None] = no_progress
) -> PieceReport:
    """Write one piece of a begun plan: read keys and order, pick the latest rows, read their features, encode, send.

    After it returns, every row of the piece is stored, counted as stale or unchanged, expired or quarantined. If it raises, any
    subset is stored, and writing the piece again is harmless.
    """
    started = time.monotonic()
    table = _pinned(view, plan)
    files = _files(table, snapshot=plan.snapshot, mode=plan.mode, interval=plan.interval, text=plan.watermark)
    files = files if plan.snapshot else cut(files, [file.size for file in files], plan.pieces)[piece]
    if not files:
        return PieceReport()
    rows, counts = table.read_order(files)
    rows = latest.selected(rows, view.join_keys, interval=plan.interval, shard=piece, shards=plan.pieces if plan.snapshot else 1)
    valid, reasons = latest.valid_rows(rows, view, now=now, max_key_bytes=store.max_key_bytes)
    winners = latest.newest(valid, view.join_keys)
    fresh = latest.unexpired(winners, view, now)
    at = stamp(plan.generation, plan.to_version)
    floor = at if plan.snapshot else NO_FLOOR
    stamped = pl.lit(at, pl.Int64) if plan.mode != "incremental" or plan.snapshot else pl.col("version") + stamp(plan.generation, 0)
    with Writer(store, _write_call(view, store, plan, now), progress) as writer:
        for order, features in _storable(view, store, table, files, counts, fresh, valid, reasons):
            size = max(1, BATCH_BYTES * features.height // (features.estimated_size() + codec.HEADER.size * features.height))
            for low in range(0, features.height, size):
                part = order.slice(low, size).with_columns(version=stamped)
                keys = codec.entity_keys(part, view.join_keys)
                writer.submit(codec.encode(keys, part, features.slice(low, size), view, schema_id=plan.schema_id, floor=floor))
    stale, written, unchanged = writer.outcomes.tolist()
    expired = winners.height - fresh.height
    report = PieceReport(
        rows_read=rows.height,
        entities=stale + written + unchanged + expired,
        written=written,
        stale=stale,
        unchanged=unchanged,
        expired=expired,
        quarantined=sum(reasons.values()),
        bytes=writer.nbytes,
        seconds=time.monotonic() - started,
        event_us=valid["event_us"].max(),  # type: ignore[arg-type] - Int64
        quarantine_reasons=reasons,
    )
    log.info("wrote piece view=%s store=%s piece=%s/%s %s", view.name, plan.store, piece + 1, plan.pieces, report)
    return report


def commit(view: FeatureView, store: OnlineStore, plan: Plan, pieces: Sequence[PieceReport], *, now: datetime) -> RunReport:
    """Finish a run whose pieces are all written: remove what a snapshot lacks, then move the watermark by compare-and-set.

    Raises WatermarkError when another run moved it first. Doing it again after success is harmless.
    """
    if len(pieces) != plan.pieces:
        raise MaterializeError(f"feature view {view.name!r}: could not commit: found {len(pieces)} written pieces, expected {plan.pieces}. Run again.")
    started = time.monotonic()
    deleted = _sweep(view, store, plan, now) if plan.sweep else 0
    report = _summed(plan, pieces, deleted)
    if plan.mode != "backfill" and plan.from_version != plan.to_version:
        before = None if plan.watermark is None else Watermark.from_json(plan.watermark).event_us
        moved = Watermark(
            generation=plan.generation,
            table_id=plan.table_id,
            version=plan.to_version,
            schema=view.schema_text,
            run_id=plan.run_id,
            event_us=max((moment for moment in (before, report.event_us) if moment is not None), default=None),
            finished_us=to_us(now),
            counts=report.counts,
        )
        with_retry(partial(watermark.move, store, view.name, plan.watermark, moved))
    store.purge(view.name, to_us(now))
    report = replace(report, seconds=report.seconds + time.monotonic() - started)
    log.info("committed view=%s store=%s mode=%s versions=%s..%s %s", view.name, plan.store, plan.mode, plan.from_version, plan.to_version, report.counts)
    return report


# --- parts of steps ----------------------------------------------------------------------------------------------------


def _files(table: OfflineTable, *, snapshot: bool, mode: Mode, interval: Interval | None, text: str | None) -> list[DataFile]:
    """The files that a run reads, in an order that every piece of the run sees alike. *text*: the planned watermark."""
    if snapshot or mode == "backfill":
        return table.snapshot_files(interval)
    return table.added_files(Watermark.from_json(text or ""))


def _pinned(view: FeatureView, plan: Plan) -> OfflineTable:
    """The table at the planned version. Raises when this process would not see what the planner saw."""
    if plan.engine != ENGINE and plan.snapshot and plan.pieces > 1:
        raise MaterializeError(
            f"feature view {view.name!r}: could not write a piece: planned with {plan.engine}, this process has {ENGINE}, and they may "
            "cut entities differently. Nothing was written by this piece. Run again with one version everywhere."
        )
    table = open_table(view, plan.to_version)
    if table.table_id != plan.table_id:
        raise RebuildNeeded(
            f"feature view {view.name!r}: could not write a piece: the table was dropped and created again during the run "
            f"(id {plan.table_id}, now {table.table_id}). The watermark stays. Run: materialize rebuild {view.name}"
        )
    return table


def _write_call(view: FeatureView, store: OnlineStore, plan: Plan, now: datetime) -> Callable[[EncodedBatch], Outcomes]:
    retention = view.retention(now)
    if plan.snapshot:
        return partial(store.replace, view.name, at=stamp(plan.generation, plan.to_version), retention=retention)
    return partial(store.merge, view.name, tie_wins=plan.mode == "incremental", retention=retention)


def _storable(
    view: FeatureView,
    store: OnlineStore,
    table: OfflineTable,
    files: Sequence[DataFile],
    counts: RowCounts,
    fresh: pl.DataFrame,
    valid: pl.DataFrame,
    reasons: dict[str, int],
) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """The order columns and the features of each entity's latest storable row, block by block; rows left out are counted in *reasons*.

    Where the latest row cannot be stored, all older rows of its entity are looked at too: one more pass, over those alone.
    """
    rejected: list[pl.DataFrame] = []
    candidates: list[pl.DataFrame] = []
    for first, features in table.read_features(files, counts, fresh["position"]):
        order = fresh.slice(first, features.height)
        bad = codec.unstorable_rows(features, view, max_value_bytes=store.max_value_bytes)
        if bad:
            mask = _count(bad, reasons)
            rejected.append(order.filter(mask))
            order, features = order.filter(~mask), features.filter(~mask)
        yield order, features
    if not rejected:
        return
    older = latest.runners_up(valid, pl.concat(rejected), view.join_keys)
    for first, features in table.read_features(files, counts, older["position"]):
        bad = codec.unstorable_rows(features, view, max_value_bytes=store.max_value_bytes)
        order = older.slice(first, features.height)
        candidates.append(order.filter(~_count(bad, reasons)) if bad else order)
    second = latest.newest(pl.concat(candidates), view.join_keys) if candidates else older
    for first, features in table.read_features(files, counts, second["position"]):
        yield second.slice(first, features.height), features


def _count(bad: dict[str, pl.Series], reasons: dict[str, int]) -> pl.Series:
    """Count each bad row under its first reason. Returns: Boolean, whether a row is bad."""
    seen = pl.repeat(value=False, n=len(next(iter(bad.values()))), eager=True)
    for reason, flags in bad.items():
        reasons[reason] = reasons.get(reason, 0) + int((flags & ~seen).sum())
        seen = seen | flags
    return seen


def _highest_version(view: FeatureView, store: OnlineStore) -> int | None:
    """The greatest version or floor of any record of *view* in the store, None when there is no record."""
    heads = (codec.headers(records) for _, records in store.scan(view.name))
    return max((int(max(head["version"].max(), head["floor"].max())) for head in heads), default=None)


def _sweep(view: FeatureView, store: OnlineStore, plan: Plan, now: datetime) -> int:
    """Tombstone every entity online that the snapshot has no storable row of. Returns how many of them were live.

    Every row of the snapshot was written with the snapshot's floor, so a lower floor means "not in the snapshot".
    """
    at, deleted, retention = stamp(plan.generation, plan.to_version), 0, view.retention(now)
    for keys, records in store.scan(view.name):
        heads = codec.headers(records)
        gone = np.flatnonzero(heads["floor"] < at)
        batch = codec.tombstones([keys[row] for row in gone], at)
        outcomes = with_retry(partial(store.replace, view.name, batch, at=at, retention=retention))
        live = heads["flags"][gone] & codec.TOMBSTONE == 0
        deleted += int((live & (outcomes == WRITTEN)).sum())
    return deleted


def _summed(plan: Plan, pieces: Sequence[PieceReport], deleted: int) -> RunReport:
    reasons: dict[str, int] = {}
    for piece in pieces:
        for reason, rows in piece.quarantine_reasons.items():
            reasons[reason] = reasons.get(reason, 0) + rows
    totals = {name: sum(getattr(piece, name) for piece in pieces) for name in COUNTERS if name != "deleted"}
    return RunReport(
        view=plan.view,
        store=plan.store,
        mode=plan.mode,
        from_version=plan.from_version,
        to_version=plan.to_version,
        deleted=deleted,
        seconds=sum(piece.seconds for piece in pieces),
        event_us=max((piece.event_us for piece in pieces if piece.event_us is not None), default=None),
        run_id=plan.run_id,
        interval=None if plan.interval is None else str(plan.interval),
        reason=plan.reason,
        quarantine_reasons=reasons,
        **totals,
    )
