"""Rows of data files in, the latest row of each entity out, by keys and order alone: in memory that does not grow with the rows.

The entities are cut into shares by the hash that pieces are cut by, and the rows are read once for each share.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from pyroaring import BitMap

from materialize import codec, latest
from materialize.codec import entity_keys
from materialize.offline import ORDER_ROWS, OrderRows, may_hold, read_features, read_parts, read_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from datetime import datetime

    import polars as pl

    from materialize.model import FeatureView
    from materialize.offline import DataFile, OfflineTable
    from materialize.online.base import EncodedBatch, OnlineStore, Outcomes
    from materialize.piece_report import PieceReport

__all__ = ["Block", "Call", "Share", "Sieve", "Source", "Wanted", "latest_rows"]


def _all(rows: pl.DataFrame) -> pl.DataFrame:
    return rows


@dataclass(frozen=True, slots=True)
class Source:
    """Rows whose latest are wanted: those of *files*, which are read as often as needed, and *held* ones, which are in memory.

    ``keep``: rows to those of them that count. The version of a row of *files* is that of its file.
    """

    table: OfflineTable
    files: Sequence[DataFile] = ()
    held: OrderRows | None = None
    keep: Callable[[pl.DataFrame], pl.DataFrame] = _all

    def parts(self, rows: int, of: pl.DataFrame | None = None) -> Iterator[OrderRows]:
        """The rows before ``keep``, in parts of about *rows*, to be joined as `OrderRows.concat` does; the same ones every time.

        With *of*, without files that have no rows of these entities; so positions are others.
        """
        files = self.files if of is None else may_hold(self.table, self.files, of)
        return chain(read_parts(self.table, files, rows=rows), () if self.held is None else (self.held,))


@dataclass(frozen=True, slots=True)
class Share:
    """The entities whose hash leaves ``part`` when divided by ``parts``."""

    part: int
    parts: int

    def of(self, rows: pl.DataFrame, join_keys: Sequence[str]) -> pl.DataFrame:
        """Those of *rows* whose entities are in it; *rows* have the join keys."""
        return latest.shard(rows, join_keys, part=self.part, parts=self.parts)


@dataclass(frozen=True, slots=True)
class Call:
    """How rows are written. ``at``: the version of their records, None for each row's own commit."""

    write: Callable[[EncodedBatch], Outcomes]
    floor: int
    at: int | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Latest rows of some entities: their keys and order, their features, and how they are written."""

    order: pl.DataFrame
    features: pl.DataFrame
    call: Call


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be written by ``call``: the latest rows of the entities of ``shares`` in ``source``. ``lost``: entities of which some may have
    none there, asked for with a function that keeps those that matter; gives their join keys, each entity once.
    """

    source: Source
    call: Call
    shares: Sequence[Share] = (Share(0, 1),)
    lost: Callable[[Callable[[pl.DataFrame], pl.DataFrame]], pl.DataFrame] | None = None


@dataclass(frozen=True, slots=True)
class Sieve:
    """What decides which rows can be stored, and what was found so far. ``report`` counts; ``gone``: the join keys of entities that have no
    row any more; ``refused``: the rows that cannot be stored, each with its reason. ``rows_held``: as in `Plan`.
    """

    view: FeatureView
    store: OnlineStore
    now: datetime
    report: PieceReport
    rows_held: int
    gone: list[pl.DataFrame] = field(default_factory=list)
    refused: list[OrderRows] = field(default_factory=list)

    def refuse(self, rows: OrderRows, refused: pl.DataFrame) -> None:
        """Count *refused* (some rows of the files of *rows*, and __reason String), and keep them in mind."""
        if not refused.is_empty():
            self.report.quarantine(latest.by_reason(refused["__reason"]))
            named = refused.with_columns(entity_keys(refused, self.view.join_keys).alias("__entity"))
            self.refused.append(rows.having(named))

    def unexpired(self, winners: pl.DataFrame) -> pl.DataFrame:
        """The rows that the view's ttl still lets readers see; the others are counted."""
        fresh = latest.unexpired(winners, self.view, self.now)
        self.report.expired += winners.height - fresh.height
        return fresh

    def unstorable(self, rows: OrderRows, order: pl.DataFrame, features: pl.DataFrame) -> pl.Series | None:
        """Which rows hold a value that cannot be stored (None: no row does); these are counted. *order*: some of the files of *rows*."""
        reasons = codec.unstorable_rows(features, self.view, max_value_bytes=self.store.max_value_bytes)
        if reasons is None:
            return None
        self.refuse(rows, order.with_columns(reasons).filter(reasons.is_not_null()))
        return reasons.is_not_null()


def latest_rows(sieve: Sieve, several: Iterable[Wanted]) -> Iterator[Block]:
    """The latest storable row of each entity that is wanted. Those of the ``lost`` entities that have none are ``gone``.

    Where the latest row cannot be stored, all older rows of its entity are looked at too: more passes, over those alone.
    Yields: rows in blocks of bounded size.
    """
    keys = sieve.view.join_keys
    for wanted in several:
        many, places = len(wanted.shares) > 1, BitMap()
        valid = entities = 0
        for share in wanted.shares:
            found = newest(sieve, wanted.source, share)
            valid, fresh = valid + found.valid, sieve.unexpired(found.rows.frame)
            entities += fresh.height
            if wanted.lost is not None:
                sieve.gone.append(latest.without(wanted.lost(partial(share.of, join_keys=keys)), fresh, keys))
            if many:
                places |= BitMap(array("I", fresh["position"].to_numpy().tobytes()))
            rows = found.rows.having(fresh.clear() if many else fresh)
            del found, fresh  # they would stay until the next ones are there, or the last block was used
        rejected = [rows.frame.clear()]
        for order, features in _blocks(wanted.source.table, rows, places if many else None):
            bad = sieve.unstorable(rows, order, features)
            if bad is None:
                yield Block(order, features, wanted.call)
            else:
                rejected.append(order[bad.arg_true()])
                yield Block(order.filter(~bad), features.filter(~bad), wanted.call)
        if len(rejected) > 1:
            at_once = max(1, sieve.rows_held * entities // valid)
            yield from _runners_up(sieve, wanted, latest.entities(rejected, keys), at_once)


@dataclass(frozen=True, slots=True)
class _Found:
    """``rows``: the latest row of each entity of a share, of those that can be stored by their keys and times, ascending by position;
    ``valid``: how many such rows there are.
    """

    rows: OrderRows
    valid: int


def newest(sieve: Sieve, source: Source, share: Share) -> _Found:
    """The latest rows of the entities of *share*; every row of it is counted.

    Holds ``rows_held`` rows at a time, or one for each of the entities if these are more.
    """
    keys, report, most = sieve.view.join_keys, sieve.report, sieve.rows_held
    places: list[OrderRows] = []
    kept: list[pl.DataFrame] = []
    refused: list[pl.DataFrame] = []
    valid = base = held = ranked = 0
    for part in source.parts(min(most, ORDER_ROWS)):
        began = time.monotonic()
        rows = latest.moved(share.of(source.keep(part.frame), keys), base)
        good, bad = latest.valid_rows(rows, sieve.view, now=sieve.now, max_key_bytes=sieve.store.max_key_bytes)
        places.append(part.having(rows.clear()))
        kept.append(good)
        refused.append(bad)
        base += int(part.counts.sum())
        report.rows_read += rows.height
        moments = (report.event_us, latest.greatest_event_us(good))
        report.event_us = max((moment for moment in moments if moment is not None), default=None)
        valid, held = valid + good.height, held + good.height
        if held > max(most, 2 * ranked):  # more than was planned: an entity may have most of all rows
            kept = [latest.newest_of(kept, keys)]
            held = ranked = kept[0].height
        report.spent("winners", time.monotonic() - began)
    began = time.monotonic()
    whole, winners = OrderRows.concat(places), latest.newest_of(kept, keys)
    sieve.refuse(whole, latest.joined(refused))
    report.spent("winners", time.monotonic() - began)
    return _Found(whole.having(winners), valid)


def _blocks(table: OfflineTable, rows: OrderRows, places: BitMap | None) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Keys and order of *rows*, or of the rows of the same files that are in *places*, with the features."""
    if places is not None:
        return read_whole(table, rows, places)
    found = read_features(table, rows, rows.frame["position"])
    return ((rows.frame.slice(first, features.height), features) for first, features in found)


def _runners_up(sieve: Sieve, wanted: Wanted, entities: pl.DataFrame, at_once: int) -> Iterator[Block]:
    """The latest storable row of each of *entities*, whose latest row is not; *at_once* of them at a time."""
    source, keys = wanted.source, sieve.view.join_keys
    for low in range(0, entities.height, at_once):
        some = entities.slice(low, at_once)
        parts = source.parts(ORDER_ROWS, some)
        rows = OrderRows.concat([part.having(source.keep(latest.among(part.frame, some, keys))) for part in parts])
        valid, _ = latest.valid_rows(rows.frame, sieve.view, now=sieve.now, max_key_bytes=sieve.store.max_key_bytes)
        rows = rows.having(latest.runners_up(valid, keys))
        candidates = [rows.frame.clear()]
        for order, features in _blocks(source.table, rows, None):
            bad = sieve.unstorable(rows, order, features)
            candidates.append(order if bad is None else order.filter(~bad))
        second = sieve.unexpired(latest.newest_of(candidates, keys))
        for order, features in _blocks(source.table, rows.having(second), None):
            yield Block(order, features, wanted.call)
        if wanted.lost is not None:
            none = latest.without(some, second, keys)
            sieve.gone.append(wanted.lost(partial(latest.among, others=none, join_keys=keys)))
