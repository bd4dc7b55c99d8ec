"""The whole story of a run: plan, begin, write the pieces, commit. Airflow and the CLI call these same functions.

A crash anywhere before `commit` has moved the watermark means: do it again, harmlessly.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Literal

from materialize import metrics, timings, watermark
from materialize.errors import MaterializeError, OnlineStoreError, RebuildNeeded, StoreChangedError
from materialize.evidence import facts_to_json
from materialize.guard import check_quarantined, check_source
from materialize.lease import Terms, held_by
from materialize.memory import rows_compared, rows_held
from materialize.model import Watermark, to_us
from materialize.offline import changes_since, live_rows, live_rows_after, open_table, total_rows
from materialize.on_demand import engine, highest_version, piece_writer, sweep, write_piece
from materialize.order import GENERATION, stamp
from materialize.piece_report import PieceReport, no_progress
from materialize.plan import ROWS_PER_PIECE, Path, Plan, choose_path, instead_of_changes, piece_count
from materialize.retry import with_retry
from materialize.run_report import greatest, summed
from materialize.store_check import after_writes, before_writes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from materialize.model import FeatureView, Interval, Mode, RunReport
    from materialize.offline import Change, OfflineTable
    from materialize.online.base import OnlineStore

__all__ = [
    "PieceReport",
    "Run",
    "backfill",
    "begin",
    "bulk_load",
    "commit",
    "incremental",
    "make_plan",
    "rebuild",
    "write_piece",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """Who runs: the store's name in the config, an id for reports and the watermark, a clock in UTC, who watches, and
    for how long it holds the view's lease and waits for another run (None: whoever calls holds it).

    ``progress`` is called with the number of entities that each finished write call handled. ``force``: do it although a check says no.
    """

    store_name: str
    run_id: str
    now: Callable[[], datetime]
    progress: Callable[[int], None] = no_progress
    lease: Terms | None = field(default_factory=Terms)
    force: bool = False


# --- the three runs ----------------------------------------------------------------------------------------------------


def incremental(view: FeatureView, store: OnlineStore, run: Run) -> RunReport:
    """Bring everything that changed between the watermark and the table's head online; the first time, the whole snapshot.

    After it returns, each entity online equals its latest storable row at the report's ``to_version``.
    """
    with _begun(view, store, run, "incremental") as (held, plan):
        pieces = [
            piece_writer()(view, store, plan, piece, now=held.now(), progress=held.progress)
            for piece in range(plan.pieces)
        ]
        return commit(view, store, plan, pieces, now=held.now())


def backfill(view: FeatureView, store: OnlineStore, run: Run, interval: Interval) -> RunReport:
    """Merge the rows of an event-time interval at the current version. Older than what is stored loses; the watermark stays."""
    names = {"store_name": run.store_name, "run_id": run.run_id}
    made = make_plan(view, store, mode="backfill", interval=interval, force=run.force, **names)
    plan = begin(view, store, made, now=run.now())
    pieces = [
        piece_writer()(view, store, plan, piece, now=run.now(), progress=run.progress) for piece in range(plan.pieces)
    ]
    return commit(view, store, plan, pieces, now=run.now())


def rebuild(view: FeatureView, store: OnlineStore, run: Run) -> RunReport:
    """Replace everything online by the snapshot at the table's head, whatever the store holds, and remove what it does not."""
    with _begun(view, store, run, "rebuild") as (held, plan):
        pieces = [
            piece_writer()(view, store, plan, piece, now=held.now(), progress=held.progress)
            for piece in range(plan.pieces)
        ]
        return commit(view, store, plan, pieces, now=held.now())


@contextmanager
def _begun(
    view: FeatureView, store: OnlineStore, run: Run, mode: Literal["incremental", "rebuild"]
) -> Iterator[tuple[Run, Plan]]:
    """Within it the view's lease is held; gives the run that looks after it, and its plan, begun."""
    with held_by(run, store, view.name, mode) as held:
        made = make_plan(view, store, mode=mode, store_name=run.store_name, run_id=run.run_id, force=run.force)
        # now() raises where the lease was lost meanwhile, before anything is claimed
        yield held, begin(view, store, made, now=held.now())


def bulk_load(view: FeatureView, store: OnlineStore, run: Run, location: str) -> RunReport:
    """Load a view for the first time by files at *location*, which the store reads by itself; then the ordinary run over the same rows.

    That run reads each row back, and writes those that the store did not take or that another run overtook; so its report counts
    rows that the files brought as unchanged. Raises OnlineStoreError for a view that is online already.
    """
    with store.bulk(view.name, location) as files:
        plan = make_plan(view, files, mode="incremental", store_name=run.store_name, run_id=run.run_id)
        held = None if plan.watermark is None else Watermark.from_json(plan.watermark)
        if held is not None and held.version is not None:
            raise OnlineStoreError(
                f"feature view {view.name!r}: could not load it by files: found it online at version {held.version}, expected a view "
                f"that was never loaded. Nothing was written. Run: materialize incremental {view.name}, or rebuild"
            )
        plan = begin(view, files, plan, now=run.now())
        for piece in range(plan.pieces):
            piece_writer()(view, files, plan, piece, now=run.now())
        told = files.load()
    # The table that holds the lease may be made by the load itself, so it is held from here on.
    with held_by(run, store, view.name, "bulk_load") as run:  # noqa: PLR1704 - nothing below uses the other one
        pieces = [
            piece_writer()(view, store, plan, piece, now=run.now(), progress=run.progress)
            for piece in range(plan.pieces)
        ]
        return replace(commit(view, store, plan, pieces, now=run.now()), reason=f"{plan.reason}; {told}")


# --- their steps -------------------------------------------------------------------------------------------------------


def make_plan(
    view: FeatureView,
    store: OnlineStore,
    *,
    mode: Mode,
    store_name: str,
    run_id: str,
    interval: Interval | None = None,
    force: bool = False,
) -> Plan:
    """What a run would do, with the table pinned at its head. Writes nothing anywhere.

    *force* lets this one run pass what stops others: a source that is empty or much smaller, too many rows that cannot be stored.

    Raises RebuildNeeded when an incremental run cannot be exact and the view does not say ``on_rebuild_needed: auto``,
    OfflineStoreError when the table cannot be read, or has lost so many rows that it looks like a mistake (`materialize.guard`).
    """
    started = time.monotonic()
    # Before the table is pinned: a run that stands still in between must not claim, with its older table, the watermark of a successor.
    text = with_retry(partial(watermark.read_text, store, view.name))
    table = open_table(view)
    found = None if text is None else Watermark.from_json(text)
    path = choose_path(view, mode, found, table.table_id, store.layout(view.name))
    changes: list[Change] = []
    held = rows_held(view.memory_limit, (table.columns[key].type for key in view.join_keys))
    if found is not None and mode == "incremental" and not path.snapshot:
        path, changes = _changes_or_snapshot(view, table, found, path, held)
    rows, items = sum(change.rows for change in changes), None if path.snapshot else len(changes)
    if path.snapshot or mode == "backfill":
        files = table.snapshot_files(interval)
        rows, items = total_rows((file.rows, file.size) for file in files), None if path.snapshot or files else 0
    live = None
    if mode != "backfill":
        live = live_rows(files) if path.snapshot or found is None else live_rows_after(table, found.rows, changes)
    # What rewriting commits brought is in memory at once; all other rows are read in shares.
    most = rows_compared(held) if any(change.removes for change in changes) else ROWS_PER_PIECE
    pieces = piece_count(rows, items=items, most=most)
    plan = Plan(
        view=view.name,
        store=store_name,
        mode=mode,
        run_id=run_id,
        table_id=table.table_id,
        from_version=None if path.snapshot or found is None else found.version,
        to_version=table.version,
        generation=path.generation,
        snapshot=path.snapshot,
        pieces=pieces,
        rows=rows,
        reason=path.reason,
        engine=engine() if pieces else "",
        interval=interval,
        fenced=_fenced(found, table) if path.snapshot else None,
        watermark=text,
        live_rows=live,
        rows_held=held,
        force=force,
    )
    check_source(view, store, found, plan, rows=live)
    return replace(plan, seconds=time.monotonic() - started)


def begin(view: FeatureView, store: OnlineStore, plan: Plan, *, now: datetime | None = None) -> Plan:
    """Check and repair the store (`materialize.store_check`), make the view's schema known to readers and, for a snapshot run,
    claim its generation in the watermark.

    After it, an older run of the view can write (harmlessly) but no longer move the watermark past a snapshot run. A crash
    leaves the watermark without a version: the next incremental run does the snapshot.
    """
    started = time.monotonic()
    begun = _begin(view, store, plan, now or datetime.now(timezone.utc))
    return replace(begun, seconds=plan.seconds + time.monotonic() - started)


def _begin(view: FeatureView, store: OnlineStore, plan: Plan, moment: datetime) -> Plan:
    plan = before_writes(view, store, plan, Run(plan.store, plan.run_id, lambda: moment, lease=None))
    schema_id = with_retry(partial(watermark.register_schema, store, view)) if plan.pieces else 0
    if not plan.snapshot:
        return replace(plan, schema_id=schema_id, positions=plan.positions | store.positions())
    # Without a watermark the store should be empty. Records there were left by an unknown past, so ours must win.
    highest = None if plan.watermark else highest_version(view, store)
    generation = plan.generation if highest is None else highest // GENERATION + 1
    before = None if plan.watermark is None else Watermark.from_json(plan.watermark)
    claim = Watermark(
        generation=generation,
        table_id=plan.table_id,
        version=None,
        schema=view.schema_text,
        order=view.order_text,
        layout=store.layout(view.name),
        run_id=plan.run_id,
        fenced=plan.fenced,
        rows=None if before is None else before.rows,
    )
    text = with_retry(partial(watermark.move, store, view.name, plan.watermark, claim))
    sweep = plan.watermark is not None or highest is not None
    return replace(
        plan, schema_id=schema_id, generation=generation, watermark=text, sweep=sweep, positions=store.positions()
    )


def commit(
    view: FeatureView, store: OnlineStore, plan: Plan, pieces: Sequence[PieceReport], *, now: datetime
) -> RunReport:
    """Finish a run whose pieces are all written: remove what a snapshot lacks, check the store, then move the watermark by compare-and-set.

    Where the store lost something of the run meanwhile, the run is planned and written again, once, by this call. Raises WatermarkError
    when another run moved the watermark first, QuarantineError when more rows cannot be stored than the view allows; then nothing was
    removed and the watermark stays. Doing it again after success is harmless.
    """
    try:
        return _commit(view, store, plan, pieces, now=now)
    except StoreChangedError as error:
        log.warning("written again view=%s store=%s: %s", view.name, plan.store, error)
        reason = str(error)
    names = {"store_name": plan.store, "run_id": plan.run_id}
    made = make_plan(view, store, mode=plan.mode, interval=plan.interval, force=plan.force, **names)
    fresh = begin(view, store, made, now=now)
    again = [piece_writer()(view, store, fresh, piece, now=now) for piece in range(fresh.pieces)]
    report = _commit(view, store, fresh, again, now=now)
    # What the first pass wrote and the store kept is unchanged for the second one, and news for readers.
    kept = min(max(sum(piece.written for piece in pieces) - report.written, 0), report.unchanged)
    found = reason.partition("could not finish the run: ")[2] or reason
    return replace(
        report,
        written=report.written + kept,
        unchanged=report.unchanged - kept,
        reason=f"{report.reason}; written again, {report.written:,} of {report.entities:,} entities differed, because it {found}",
        seconds=report.seconds + sum(piece.seconds for piece in pieces),
        timings=timings.summed([report.timings, *(piece.timings for piece in pieces)]),
    )


def _commit(
    view: FeatureView, store: OnlineStore, plan: Plan, pieces: Sequence[PieceReport], *, now: datetime
) -> RunReport:
    if len(pieces) != plan.pieces:
        raise MaterializeError(
            f"feature view {view.name!r}: could not commit: found {len(pieces)} written pieces, expected {plan.pieces}. Run again."
        )
    started = time.monotonic()
    report = summed(plan, pieces)
    check_quarantined(view, plan, report, rows=report.rows_read)
    swept = sweep(view, store, plan, now) if plan.sweep else 0
    report = replace(report, deleted=report.deleted + swept)
    before = None if plan.watermark is None else Watermark.from_json(plan.watermark)
    lacking = with_retry(partial(store.settle, view.name))
    positions = plan.positions.copy()
    for written in (store.positions(), *(piece.positions for piece in pieces)):
        positions |= {name: max(offset, positions.get(name, 0)) for name, offset in written.items()}
    lost = sum(piece.lost for piece in pieces)
    facts, told = after_writes(view, store, plan, positions, lost)
    changed = (
        plan.moved or plan.from_version != plan.to_version or (before is not None and before.schema != view.schema_text)
    )
    if plan.mode != "backfill" and changed:
        moved = Watermark(
            generation=plan.generation,
            table_id=plan.table_id,
            version=plan.to_version,
            schema=view.schema_text,
            order=view.order_text,
            layout=store.layout(view.name),
            run_id=plan.run_id,
            floor=stamp(plan.generation, plan.to_version) if plan.snapshot or before is None else before.floor,
            event_us=greatest(None if before is None else before.event_us, report.event_us),
            finished_us=to_us(now),
            rows=plan.live_rows,
            counts=report.counts,
            evidence=facts_to_json(facts),
        )
        text = with_retry(partial(watermark.move, store, view.name, plan.watermark, moved))
        # A failover between the check and the watermark would have lost what the watermark claims.
        lacking = with_retry(partial(store.settle, view.name))
        _, told = after_writes(view, store, replace(plan, watermark=text), positions | store.positions())
    store.purge(view.name, to_us(now))
    reason = "; ".join(words for words in (report.reason, told, lacking) if words)
    took = time.monotonic() - started
    spent = report.timings | {"commit": round(took, 6)}
    report = replace(report, seconds=report.seconds + took, timings=spent, reason=reason)
    log.info(
        "committed view=%s store=%s mode=%s versions=%s..%s %s",
        view.name,
        plan.store,
        plan.mode,
        plan.from_version,
        plan.to_version,
        report.counts,
    )
    metrics.finished(report, now)
    return report


# --- parts of steps ----------------------------------------------------------------------------------------------------


def _changes_or_snapshot(
    view: FeatureView, table: OfflineTable, found: Watermark, path: Path, held: int
) -> tuple[Path, list[Change]]:
    """The changes since the watermark, or the way over the snapshot where they cannot be told, or cost more."""
    try:
        changes = changes_since(table, found)
    except RebuildNeeded as error:
        if view.on_rebuild_needed != "auto":
            raise
        return Path(snapshot=True, generation=found.generation + 1, reason=f"rebuild was needed: {error.reason}"), []
    rewriting = [change for change in changes if change.removes]
    instead = rewriting and instead_of_changes(
        path.generation,
        changed_bytes=sum(change.size for change in rewriting),
        largest_rows=max(change.rows for change in rewriting),
        snapshot_bytes=table.size,
        rows_held=held,
    )
    return (instead, []) if instead else (path, changes)


def _fenced(found: Watermark | None, table: OfflineTable) -> int:
    """The version after which a snapshot run has to look for entities that are gone; its own, for a table that is new to the store."""
    if found is None or found.table_id != table.table_id:
        return table.version
    fenced = found.fenced if found.version is None else found.version
    return table.version if fenced is None else min(fenced, table.version)
