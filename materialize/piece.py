"""One piece of a run: files of a Delta table in, its latest rows in the online store and a count of everything out.

A row's way: `offline.read_parts` -> `latest.newest` -> `offline.read_features` -> `codec.encode` -> `Writer` -> the store.
"""

from __future__ import annotations

import logging
import time
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from materialize import codec, latest, readback, watermark
from materialize.ahead import ahead
from materialize.codec import entity_keys
from materialize.errors import MaterializeError, RebuildNeeded
from materialize.guard import check_quarantined
from materialize.memory import shares_compared
from materialize.model import Watermark
from materialize.offline import (
    Quarantine,
    appended_files,
    brought,
    changes_since,
    may_hold,
    open_table,
    read_entities,
    read_order,
    read_rewritten,
    removed_since,
    told_rows,
    total_rows,
    versions_are_exact,
    with_versions,
)
from materialize.online.base import HEADER
from materialize.order import NO_FLOOR, WRITTEN, stamp
from materialize.pacing import Pacer
from materialize.piece_report import PieceReport, no_progress
from materialize.plan import cut
from materialize.refused import erased
from materialize.removal import remove
from materialize.retry import with_retry
from materialize.winners import Block, Call, Share, Sieve, Source, Wanted, latest_rows
from materialize.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    import polars as pl

    from materialize.model import FeatureView
    from materialize.offline import OfflineTable, OrderRows
    from materialize.online.base import EncodedBatch, OnlineStore, Outcomes
    from materialize.plan import Plan

__all__ = ["PieceReport", "Snapshot", "no_progress", "write_piece"]

log = logging.getLogger(__name__)

#: Bytes of records per write call: large enough to hide a round trip, small enough to overlap encoding with sending.
BATCH_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class _Piece:
    """What every part of a piece needs. ``number``: of the plan's pieces. ``sieve``: counts while the piece is read, in the piece's report too."""

    view: FeatureView
    store: OnlineStore
    plan: Plan
    number: int
    table: OfflineTable
    sieve: Sieve

    @property
    def now(self) -> datetime:
        return self.sieve.now

    @property
    def report(self) -> PieceReport:
        return self.sieve.report

    def without_erased(self, told: pl.DataFrame) -> pl.DataFrame:
        """*told*, as the quarantine table has rows, but for those of entities that were erased in the store."""
        gone = erased(self.store, self.plan.view, told["entity"].drop_nulls().unique().to_list())
        return told.filter(~told["entity"].is_in(gone).fill_null(value=False)) if gone else told

    @property
    def at(self) -> int:
        """The planned version, as records carry it."""
        return stamp(self.plan.generation, self.plan.to_version)

    @property
    def shares(self) -> list[Share]:
        """What this piece's rows are read in: of its entities, or of all where pieces are cut by what changed."""
        number, pieces = (0, 1) if self.plan.reads_changes else (self.number, self.plan.pieces)
        return [Share(number + pieces * share, pieces * self.plan.shares) for share in range(self.plan.shares)]

    def compared(self, rows: int) -> list[Callable[[pl.DataFrame], pl.DataFrame]]:
        """What *rows* of a commit are compared in: of all rows those of a share of all entities."""
        return latest.shards(self.view.join_keys, shares_compared(rows, self.plan.rows_held))

    @property
    def watermark(self) -> Watermark | None:
        return None if self.plan.watermark is None else Watermark.from_json(self.plan.watermark)


def write_piece(
    view: FeatureView,
    store: OnlineStore,
    plan: Plan,
    piece: int,
    *,
    now: datetime,
    progress: Callable[[int], None] = no_progress,
) -> PieceReport:
    """Write one piece of a begun plan: read keys and order, pick the latest rows, read their features, encode, send.

    After it returns, every row of the piece is stored, counted as stale or unchanged, expired, or kept in quarantine. If it raises,
    any subset is stored, and writing the piece again is harmless. *progress* gets the number of entities of each finished write.
    """
    started, report = time.monotonic(), PieceReport()
    work = _Piece(view, store, plan, piece, _pinned(view, plan), Sieve(view, store, now, report, plan.rows_held))
    read = _read_changes if plan.reads_changes else _read_snapshot if plan.snapshot else _read_interval
    with Pacer(store, view.name) as pacer:
        began = time.monotonic()
        with Writer(store, progress, rows=plan.rows // plan.pieces) as writer:
            for keys, part in _batches(work, latest_rows(work.sieve, read(work))):
                floor = part.call.floor
                batch = codec.encode(keys, part.order, part.features, view, schema_id=plan.schema_id, floor=floor)
                writer.submit(batch, part.call.write)
        written = time.monotonic()
        quarantine = Quarantine(view, plan.store)  # before the commit, so that no row is counted which is not kept
        for rows in told_rows(work.table, work.sieve.refused, store=plan.store, run_id=plan.run_id, now=now):
            quarantine.keep(work.without_erased(rows))
        for entities in work.sieve.gone:
            check_quarantined(view, plan, report, rows=max(report.rows_read, plan.rows * (plan.pieces > 1)))
            report.deleted += remove(view, store, plan, entity_keys(entities, view.join_keys).to_list(), now)
    report.positions = store.positions()
    if plan.evidence is not None:  # a store that can lose a part of what it took
        report.lost = readback.missing(view, store, *writer.sample(), now)
    report.stale, report.written, report.unchanged = writer.outcomes.tolist()
    report.entities = report.stale + report.written + report.unchanged + report.expired
    report.held_back, report.probe = pacer.held_back, pacer.probe
    report.bytes, report.seconds = writer.nbytes, time.monotonic() - started
    _tell_time(report, writer, loop=written - began)
    log.info("wrote piece view=%s store=%s piece=%s/%s %s", view.name, plan.store, piece + 1, plan.pieces, report)
    return report


def _tell_time(report: PieceReport, writer: Writer, *, loop: float) -> None:
    """Where the seconds of *report* went. *loop*: those from the first block to the end of the last write, in the thread that encodes."""
    read, waited = report.timings.get("read", 0.0), report.timings.get("wait_read", 0.0)
    report.timings |= {"read": read - report.timings.get("winners", 0.0)}
    report.timings |= {
        "encode": loop - waited - writer.waited,
        "wait_store": writer.waited,
        "rest": report.seconds - loop,
    }
    # Two clocks: a call that never waits may seem to have had a core for longer than it took.
    report.timings |= {"send": writer.work, "server": max(writer.seconds - writer.work, 0.0)}


class Snapshot:
    """A snapshot as a rebuild would write it, for who compares. ``rows``: the keys and order of all its rows.

    Raises as `write_piece` does.
    """

    def __init__(self, view: FeatureView, store: OnlineStore, plan: Plan, now: datetime) -> None:
        self.work = _Piece(
            view, store, plan, 0, _pinned(view, plan), Sieve(view, store, now, PieceReport(), plan.rows_held)
        )
        self.rows = _snapshot_rows(self.work)

    def planned(self, plan: Plan) -> Snapshot:
        """The same snapshot, whose records carry the generation of another *plan* for it. Reads nothing."""
        other = copy(self)
        other.work = replace(self.work, plan=plan)
        return other

    def in_new_generation(self) -> Snapshot:
        """The same snapshot in a new generation, which the watermark has from now on.

        A record with this snapshot's floor refuses to be written again; in a new generation it does not. A run that began in the old one
        can no longer move the watermark, so the next run brings again what was refused of it. Raises WatermarkError when another
        run moved the watermark first.
        """
        work, plan = self.work, self.work.plan
        assert plan.watermark is not None  # noqa: S101 - without one there is no snapshot to compare with
        mark = Watermark.from_json(plan.watermark)
        moved = replace(mark, generation=mark.generation + 1, run_id=plan.run_id)
        text = with_retry(partial(watermark.move, work.store, work.view.name, plan.watermark, moved))
        return self.planned(replace(plan, generation=moved.generation, watermark=text))

    def write(self, rows: pl.DataFrame, progress: Callable[[int], None]) -> int:
        """Write the `records` of *rows*. Returns: how many the store took."""
        with Writer(self.work.store, progress) as writer:
            for batch, write in self.records(rows):
                writer.submit(batch, write)
        return int(writer.outcomes[WRITTEN])

    def exact(self, rows: pl.DataFrame) -> pl.Series:
        """Whether the version of each of *rows* is the commit that brought it, as far as the log tells. Returns: Boolean."""
        return versions_are_exact(self.work.table, self.rows.having(rows))

    def records(self, rows: pl.DataFrame) -> Iterator[tuple[EncodedBatch, Callable[[EncodedBatch], Outcomes]]]:
        """The record of each entity in *rows* (some of ``rows.frame``) that has a storable and unexpired row there.

        Yields: batches, each with the call that writes it as the entities' full state.
        """
        view, plan, call = self.work.view, self.work.plan, _replace(self.work)
        wanted = Wanted(Source(self.work.table, held=self.rows.having(rows)), call)
        for keys, part in _batches(self.work, latest_rows(self.work.sieve, [wanted])):
            batch = codec.encode(keys, part.order, part.features, view, schema_id=plan.schema_id, floor=call.floor)
            yield batch, call.write

    def refused(self) -> Iterator[pl.DataFrame]:
        """The rows of these that cannot be stored, as the quarantine table has them (`offline.told_rows`)."""
        work, plan = self.work, self.work.plan
        return told_rows(work.table, work.sieve.refused, store=plan.store, run_id=plan.run_id, now=work.now)


def _pinned(view: FeatureView, plan: Plan) -> OfflineTable:
    """The table at the planned version. Raises when this process would not see what the planner saw."""
    if plan.engine != latest.ENGINE and not plan.reads_changes and plan.pieces > 1:
        raise MaterializeError(
            f"feature view {view.name!r}: could not write a piece: planned with {plan.engine}, this process has {latest.ENGINE}, and they may "
            "cut entities differently. Nothing was written by this piece. Run again with one version everywhere."
        )
    table = open_table(view, plan.to_version)
    if table.table_id != plan.table_id:
        raise RebuildNeeded(
            f"feature view {view.name!r}: could not write a piece: the table was dropped and created again during the run "
            f"(id {plan.table_id}, now {table.table_id}). The watermark stays. Run: materialize rebuild {view.name}",
            "the table was dropped and created again",
        )
    return table


def _batches(work: _Piece, blocks: Iterator[Block]) -> Iterator[tuple[pl.Series, Block]]:
    """The rows of *blocks* in parts of bounded bytes, each with its entity keys, and with the versions that its records carry."""
    for block in ahead(blocks, work.report.spent):
        rows = block.features.height
        size = max(1, BATCH_BYTES * rows // (int(block.features.estimated_size()) + HEADER.size * rows + 1))
        for low in range(0, rows, size):
            part = block.order.slice(low, size)
            stamped = latest.stamped(part, work.plan.generation, at=block.call.at)
            yield (
                entity_keys(part, work.view.join_keys),
                Block(stamped, block.features.slice(low, size), block.call),
            )


# --- what a piece reads ------------------------------------------------------------------------------------------------


def _read_changes(work: _Piece) -> Iterator[Wanted]:
    """The rows that commits brought, to be merged; the entities that lost one, to be replaced by their state in the snapshot."""
    table, keys, watermark = work.table, work.view.join_keys, work.watermark
    assert watermark is not None  # noqa: S101 - the planner reads changes only after a watermark
    changes = changes_since(table, watermark)
    mine = cut(changes, [change.size for change in changes], work.plan.pieces)[work.number]
    rows = Source(table, appended_files(table, mine))
    if not any(change.removes for change in mine):
        yield Wanted(rows, _merge(work), work.shares)
        return
    found = read_rewritten(table, mine, work.compared)
    lost = latest.valid_entities(found.lost, keys, work.store.max_key_bytes)
    kept = partial(latest.without, others=lost, join_keys=keys)
    yield Wanted(replace(rows, held=found.added, keep=kept), _merge(work), work.shares)
    del rows, found
    if not lost.is_empty():
        yield Wanted(_left(work, lost), _replace(work), lost=lambda keep: keep(lost))


def _left(work: _Piece, lost: pl.DataFrame) -> Source:
    """The rows that entities have in the snapshot. *lost*: their join keys."""
    table, keys = work.table, work.view.join_keys
    files = may_hold(table, table.snapshot_files(), lost)
    theirs = partial(latest.among, others=lost, join_keys=keys)
    if total_rows((file.rows, file.size) for file in files) > work.plan.rows_held:
        return Source(table, brought(table, files), keep=theirs)
    left = read_order(table, files, keep=theirs)
    if latest.have_ties(left.frame, keys):
        left = with_versions(table, left)
    return Source(table, held=left)


def _read_snapshot(work: _Piece) -> Iterator[Wanted]:
    """This piece's share of the entities, to be replaced; those that lost their last row lately get a floor, online or not."""
    table, plan = work.table, work.plan
    rows, lost = Source(table, brought(table, table.snapshot_files())), None
    if plan.fenced is not None and plan.fenced < plan.to_version:
        removed = removed_since(table, plan.fenced)

        def lost(keep: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
            entities = read_entities(table, removed, keep)
            return latest.valid_entities(entities, work.view.join_keys, work.store.max_key_bytes)

    yield Wanted(rows, _replace(work), work.shares, lost)


def _snapshot_rows(work: _Piece) -> OrderRows:
    """Keys and order of every row of the snapshot, each with the commit that brought it."""
    return with_versions(work.table, read_order(work.table, work.table.snapshot_files()))


def _read_interval(work: _Piece) -> Iterator[Wanted]:
    """This piece's share of the entities with their rows of an event-time interval, to be merged; older than what is stored loses.

    By entities and not by files: of rows that are equal in time, the store could not tell which came later.
    """
    table, interval = work.table, work.plan.interval
    assert interval is not None  # noqa: S101 - every backfill has one
    files = brought(table, table.snapshot_files(interval))
    rows = Source(table, files, keep=partial(latest.within, interval=interval))
    yield Wanted(rows, _merge(work), work.shares)


# --- how it is written -------------------------------------------------------------------------------------------------


def _merge(work: _Piece) -> Call:
    changes = work.plan.reads_changes
    retention = work.view.retention(work.now)
    write = partial(work.store.merge, work.view.name, tie_wins=changes, retention=retention)
    return Call(write, floor=_known_floor(work), at=None if changes else work.at)


def _replace(work: _Piece) -> Call:
    write = partial(work.store.replace, work.view.name, at=work.at, retention=work.view.retention(work.now))
    return Call(write, floor=work.at, at=work.at)


def _known_floor(work: _Piece) -> int:
    """The floor that most entities have online, and that an entity has which the last whole snapshot did not have.

    Records that already carry it are stored as they are, at half the server's time. Not with a ttl: there a floor makes a
    record stay longer.
    """
    found = work.watermark
    return NO_FLOOR if work.view.ttl is not None or found is None or found.version is None else found.floor
