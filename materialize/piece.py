"""One piece of a run: files of a Delta table in, its latest rows in the online store and a count of everything out.

A row's way: `OfflineTable.read_order` -> `latest.newest` -> `OfflineTable.read_features` -> `codec.encode` -> `Writer` -> the store.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from materialize import codec, latest
from materialize.entity_key import entity_keys
from materialize.errors import MaterializeError, RebuildNeeded
from materialize.model import Watermark
from materialize.offline import open_table, planned_files
from materialize.online.base import HEADER
from materialize.order import NO_FLOOR, stamp
from materialize.plan import cut
from materialize.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    import polars as pl

    from materialize.model import FeatureView
    from materialize.offline import DataFile, OfflineTable, RowCounts
    from materialize.online.base import EncodedBatch, OnlineStore, Outcomes
    from materialize.plan import Plan

__all__ = ["PieceReport", "no_progress", "write_piece"]

log = logging.getLogger(__name__)

#: Bytes of records per write call: large enough to hide a round trip, small enough to overlap encoding with sending.
BATCH_BYTES = 4 * 2**20


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
class _Source:
    """The rows that one piece reads. ``counts``: physical rows per file. Both grow while they are read: ``reasons``, rows that
    cannot be stored, by reason; ``expired``, latest rows left out because of the view's ttl, per pass.
    """

    view: FeatureView
    table: OfflineTable
    files: list[DataFile]
    counts: RowCounts
    max_value_bytes: int
    reasons: dict[str, int]
    expired: list[int]
    now: datetime


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

    After it returns, every row of the piece is stored, counted as stale or unchanged, expired or quarantined. If it raises, any
    subset is stored, and writing the piece again is harmless. *progress* gets the number of entities of each finished write.
    """
    started = time.monotonic()
    table = _pinned(view, plan)
    files = _files(table, plan, piece)
    if not files:
        return PieceReport()
    rows, counts = table.read_order(files)
    rows = latest.selected(
        rows, view.join_keys, interval=plan.interval, shard=piece, shards=plan.pieces if plan.snapshot else 1
    )
    valid, reasons = latest.valid_rows(rows, view, now=now, max_key_bytes=store.max_key_bytes)
    winners = latest.newest(valid, view.join_keys)
    fresh = latest.unexpired(winners, view, now)
    at = stamp(plan.generation, plan.to_version)
    floor = at if plan.snapshot else _known_floor(view, plan)
    source = _Source(view, table, files, counts, store.max_value_bytes, reasons, [winners.height - fresh.height], now)
    with Writer(store, _write_call(view, store, plan, now), progress) as writer:
        for order, features in _storable(source, fresh, valid):
            size = max(
                1,
                BATCH_BYTES * features.height // (int(features.estimated_size()) + HEADER.size * features.height + 1),
            )
            for low in range(0, features.height, size):
                part = order.slice(low, size)
                keys = entity_keys(part, view.join_keys)
                stamped = latest.stamped(part, plan.generation, at=None if plan.merges_commits else at)
                writer.submit(
                    codec.encode(keys, stamped, features.slice(low, size), view, schema_id=plan.schema_id, floor=floor)
                )
    stale, written, unchanged = writer.outcomes.tolist()
    expired = sum(source.expired)
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
        event_us=latest.greatest_event_us(valid),
        quarantine_reasons=reasons,
    )
    log.info("wrote piece view=%s store=%s piece=%s/%s %s", view.name, plan.store, piece + 1, plan.pieces, report)
    return report


def _files(table: OfflineTable, plan: Plan, piece: int) -> list[DataFile]:
    """The files of one piece: all of them when pieces are cut between entities, else its share."""
    found = None if plan.watermark is None else Watermark.from_json(plan.watermark)
    files = planned_files(table, whole=not plan.merges_commits, interval=plan.interval, watermark=found)
    return files if plan.snapshot else cut(files, [file.size for file in files], plan.pieces)[piece]


def _known_floor(view: FeatureView, plan: Plan) -> int:
    """The floor that most entities have online, and that an entity has which the last whole snapshot did not have.

    Records that already carry it are stored as they are, at half the server's time. Not with a ttl: there a floor makes a
    record stay longer.
    """
    found = None if plan.watermark is None else Watermark.from_json(plan.watermark)
    return NO_FLOOR if view.ttl is not None or found is None or found.version is None else found.floor


def _pinned(view: FeatureView, plan: Plan) -> OfflineTable:
    """The table at the planned version. Raises when this process would not see what the planner saw."""
    if plan.engine != latest.ENGINE and plan.snapshot and plan.pieces > 1:
        raise MaterializeError(
            f"feature view {view.name!r}: could not write a piece: planned with {plan.engine}, this process has {latest.ENGINE}, and they may "
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


def _storable(source: _Source, fresh: pl.DataFrame, valid: pl.DataFrame) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """The order columns and the features of each entity's latest storable row, block by block.

    Where the latest row cannot be stored, all older rows of its entity are looked at too: one more pass, over those alone.
    """
    rejected: list[pl.DataFrame] = []
    for first, features in _read_ahead(source.table.read_features(source.files, source.counts, fresh["position"])):
        order, bad = fresh.slice(first, features.height), _unstorable(source, features)
        if bad is None:
            yield order, features
        else:
            rejected.append(order.filter(bad))
            yield order.filter(~bad), features.filter(~bad)
    if not rejected:
        return
    older = latest.runners_up(valid, rejected, source.view.join_keys)
    candidates = [older.clear()]
    for first, features in source.table.read_features(source.files, source.counts, older["position"]):
        order, bad = older.slice(first, features.height), _unstorable(source, features)
        candidates.append(order if bad is None else order.filter(~bad))
    newest = latest.newest_of(candidates, source.view.join_keys)
    second = latest.unexpired(newest, source.view, source.now)
    source.expired.append(newest.height - second.height)
    for first, features in source.table.read_features(source.files, source.counts, second["position"]):
        yield second.slice(first, features.height), features


def _read_ahead(blocks: Iterator[tuple[int, pl.DataFrame]]) -> Iterator[tuple[int, pl.DataFrame]]:
    """The same blocks, each read while the one before it is encoded and sent."""
    with ThreadPoolExecutor(1, thread_name_prefix="materialize-read") as pool:
        coming = pool.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = pool.submit(next, blocks, None)
            yield block


def _unstorable(source: _Source, features: pl.DataFrame) -> pl.Series | None:
    """Which rows hold a value that cannot be stored (None: no row does); these are counted."""
    bad, reasons = codec.unstorable_rows(features, source.view, max_value_bytes=source.max_value_bytes)
    for reason, count in reasons.items():
        source.reasons[reason] = source.reasons.get(reason, 0) + count
    return bad
