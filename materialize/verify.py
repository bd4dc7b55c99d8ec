"""A feature view and a store in, where they differ out: online against offline, and the narrowest repair.

The table is read as a rebuild reads it, at the watermark's version, and the store once. Compared is which row each entity has, and
the bytes of its features. What was written after the watermark is newer than both and is left out.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from materialize import decoder, latest, metrics, watermark
from materialize.codec import entity_keys
from materialize.errors import OnlineStoreError
from materialize.lease import held_by
from materialize.model import Watermark, to_us
from materialize.offline import open_table, total_rows
from materialize.online.base import HEADER, TOMBSTONE
from materialize.order import stamp
from materialize.piece import Snapshot, no_progress
from materialize.plan import Plan, changed_layout, changed_view
from materialize.removal import remove
from materialize.retry import with_retry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import numpy.typing as npt

    from materialize.feature_type import FeatureType
    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore
    from materialize.pipeline import Run

__all__ = [
    "CONFIDENCE",
    "PROBLEMS",
    "SMALLEST",
    "VerifyReport",
    "mismatch",
    "plan_comparison",
    "sample_size",
    "verify",
]

#: How online can differ from offline.
PROBLEMS = ("missing", "extra", "stale", "wrong")
#: A sample finds a problem with this probability if this share of the entities has one.
CONFIDENCE, SMALLEST = 0.99, 0.001
#: Entities of one read.
AT_ONCE = 10_000
#: How far the store's clock may be from ours: rows that expire within it may be there or not.
SKEW_US = 60_000_000
#: The columns that are compared, as DIGEST makes them of a record.
COMPARED = {"key": pl.Binary, "event_us": pl.Int64, "created_us": pl.Int64, "flags": pl.Binary, "body": pl.UInt64}
DIGEST = {
    "flags": pl.col("record").bin.slice(1, 1),
    # nulls have a hash too
    "body": pl.when(pl.col("record").is_not_null()).then(pl.col("record").bin.slice(HEADER.size).hash()),
}
#: Which rows of an entity, equal in their times, may be of its latest commit: those of the greatest version; all of them where that
#: version is not known exactly, because a row of an older commit may have been moved into its file.
NEWEST = pl.col("version") == pl.col("version").max()
MAY_BE_LATEST = NEWEST | (NEWEST & ~pl.col("exact")).any()
#: What stands for bytes that are no record: a live record of no schema.
FOREIGN = HEADER.pack(decoder.FORMAT_VERSION, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a comparison found; counters are entities.

    ``version``: of the table, where the watermark is. ``missing``: readers see nothing, the table has a row. ``extra``: readers
    see a row, the table has none. ``stale``: readers see an older row. ``wrong``: readers see other values, or none because the
    record cannot be decoded. ``newer``: written after the watermark, or erased; not compared. ``repaired``: written or removed.
    """

    view: str
    store: str
    compare: Literal["sample", "full"]
    version: int
    compared: int
    missing: int
    extra: int
    stale: int
    wrong: int
    newer: int
    repaired: int
    seconds: float
    run_id: str
    #: The entity keys of each problem; in no text and no JSON.
    keys: dict[str, list[bytes]] = field(repr=False, compare=False)

    @property
    def mismatched(self) -> int:
        return self.missing + self.extra + self.stale + self.wrong

    @property
    def share(self) -> float:
        """Of the compared entities, those that differ, from 0 to 1."""
        return self.mismatched / max(self.compared, 1)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__ if name != "keys"}


def sample_size(confidence: float = CONFIDENCE, smallest: float = SMALLEST) -> int:
    """How many entities find a problem that the share *smallest* of all has, with probability *confidence*; both in (0, 1)."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - smallest))


def mismatch(report: VerifyReport, most: float) -> str | None:
    """The message of a MismatchError where a greater share than *most* (0 to 1) of the compared entities differs, else None."""
    if report.share <= most:
        return None
    counts = ", ".join(f"{problem} {getattr(report, problem):,}" for problem in PROBLEMS)
    if report.repaired == report.mismatched:
        state = "All of them are repaired; find out who else writes to the store or what it lost."
    else:
        state = (
            f"{report.repaired:,} of them are repaired; the watermark stays. "
            f"Run: materialize verify {report.view} --store {report.store} --repair"
        )
    return (
        f"feature view {report.view!r}: could not find the online store {report.store!r} equal to the table at version {report.version}: found that "
        f"{report.mismatched:,} of {report.compared:,} compared entities differ ({counts}), expected at most {most:.4%}. {state}"
    )


def verify(
    view: FeatureView, store: OnlineStore, run: Run, *, sample: int | None = None, repair: bool = False
) -> VerifyReport:
    """Compare what readers of *store* see with the table at the watermark's version.

    *sample*: about as many entities of the table, and as many of the store; all without it. *repair*: then write the table's state
    of the entities that differ, and of no other; a run that is newer still wins, and a crash leaves any subset repaired. A row
    that was quarantined because its time was too far in the future, and no longer is, counts as missing or stale.

    Raises OnlineStoreError when there is nothing to compare with: the view never loaded, or was changed since, or its rebuild is
    under way; OfflineStoreError when the table cannot be read at that version.
    """
    started = time.monotonic()
    plan = plan_comparison(view, store, store_name=run.store_name, run_id=run.run_id)
    if repair:
        plan = replace(plan, schema_id=with_retry(partial(watermark.register_schema, store, view)))
    known = _Known(view, with_retry(partial(watermark.schemas, store, view.name)))
    batches = store.scan(view.name, start=random.random() if sample else 0.0)  # noqa: S311 - a sample, not a secret
    held = _held(known, batches if sample is None else _first(batches, sample))
    snapshot = Snapshot(view, store, plan, run.now())
    rows = snapshot.rows.frame if sample is None else _chosen(view, snapshot.rows.frame, held["key"], sample)
    wanted = _wanted(snapshot, rows, run.progress)
    if sample is not None:
        others = wanted.join(held, on="key", how="anti")["key"].to_list()
        held = pl.concat([held, _held(known, _read(view, store, others))])
    found = _compared(view, wanted, held, plan, to_us(run.now()))
    found = _without_ties(view, snapshot, rows, found)
    repaired = _repair(view, store, run, snapshot, plan, found) if repair else 0
    keys = {problem: found.filter(problem=problem)["key"].to_list() for problem in PROBLEMS}
    report = VerifyReport(
        view=view.name,
        store=run.store_name,
        compare="full" if sample is None else "sample",
        version=plan.to_version,
        compared=int(found["problem"].ne_missing("newer").sum()),
        newer=int(found["problem"].eq_missing("newer").sum()),
        repaired=repaired,
        seconds=time.monotonic() - started,
        run_id=run.run_id,
        keys=keys,
        **{problem: len(those) for problem, those in keys.items()},
    )
    metrics.verified(report)
    return report


def plan_comparison(view: FeatureView, store: OnlineStore, *, store_name: str, run_id: str) -> Plan:
    """The rebuild whose result the store should hold, at the watermark's version. Raises as `verify` does."""
    text = with_retry(partial(watermark.read_text, store, view.name))
    mark = None if text is None else Watermark.from_json(text)
    changed = None if mark is None else changed_view(view, mark) or changed_layout(mark, store.layout(view.name))
    if mark is None or mark.version is None or changed:
        what = "it never loaded" if mark is None else changed or f"the snapshot run {mark.run_id} did not finish"
        raise OnlineStoreError(
            f"feature view {view.name!r}: could not compare {store.location} with the table: found that {what}, expected a finished run. "
            f"Nothing was written. Run: materialize incremental {view.name}"
        )
    table = open_table(view, mark.version)
    return Plan(
        view=view.name,
        store=store_name,
        mode="rebuild",
        run_id=run_id,
        table_id=mark.table_id,
        from_version=None,
        to_version=mark.version,
        generation=mark.generation,
        snapshot=True,
        pieces=1,
        rows=total_rows((file.rows, file.size) for file in table.snapshot_files()),
        reason="compare online with offline",
        engine=latest.ENGINE,
        watermark=text,
    )


# --- what is compared: key, order, flags and a hash of the features' bytes ---------------------------------------------


def _wanted(snapshot: Snapshot, rows: pl.DataFrame, progress: Callable[[int], None] = no_progress) -> pl.DataFrame:
    """What the store should hold of the entities of *rows*."""
    parts = [pl.DataFrame(schema=COMPARED)]
    for batch, _ in snapshot.records(rows):
        columns = {
            "key": batch.keys,
            "event_us": batch.event_us,
            "created_us": batch.created_us,
            "record": batch.values,
        }
        parts.append(pl.DataFrame(columns).select("key", "event_us", "created_us", **DIGEST))
        progress(len(batch.keys))
    return pl.concat(parts)


def _held(known: _Known, batches: Iterable[tuple[list[bytes], list[bytes]]]) -> pl.DataFrame:
    """What the store holds. ``body`` is null where readers of the view could not decode the record."""
    parts = [pl.DataFrame(schema=COMPARED | {"version": pl.Int64, "floor": pl.Int64, "live": pl.Boolean})]
    for keys, found in batches:
        records = [record if _sound(record) else FOREIGN for record in found]
        heads = decoder.headers(records)
        columns = {name: heads[name].astype(np.int64) for name in ("event_us", "created_us", "version", "floor")}
        live = heads["flags"] & TOMBSTONE == 0
        readable = pl.Series(known.readable(records, heads["schema"]), dtype=pl.Binary)
        frame = pl.DataFrame({"key": keys, "record": readable, "live": live, **columns})
        parts.append(frame.select("key", "event_us", "created_us", "version", "floor", "live", **DIGEST))
    # A scan may return a key twice.
    return pl.concat(parts, how="diagonal").unique("key", keep="last")


def _sound(record: bytes) -> bool:
    return len(record) >= HEADER.size and record[0] == decoder.FORMAT_VERSION


class _Known:
    """The schemas that readers of *view* know, to bring records of all of them into one form."""

    def __init__(self, view: FeatureView, schemas: Mapping[int, Mapping[str, FeatureType]]) -> None:
        self.view = view
        self.same = [number for number, held in schemas.items() if [*held.items()] == [*view.features.items()]]
        self.wider = {number: held for number, held in schemas.items() if view.features.items() <= held.items()}

    def readable(self, records: list[bytes], ids: npt.NDArray[np.uint16]) -> list[bytes | None]:
        """Each record as one of the view's features in their order; None when it lacks some, or its schema is not known."""
        readable: list[bytes | None] = [*records]
        for row in np.flatnonzero(~np.isin(ids, self.same)):
            readable[row] = self._narrowed(records[row], int(ids[row]))
        return readable

    def _narrowed(self, record: bytes, schema_id: int) -> bytes | None:
        try:
            held = self.wider.get(schema_id)
            return None if held is None else decoder.narrowed(record, held, self.view.features)
        except OnlineStoreError:
            return None


# --- a sample ----------------------------------------------------------------------------------------------------------


def _first(batches: Iterable[tuple[list[bytes], list[bytes]]], size: int) -> Iterable[tuple[list[bytes], list[bytes]]]:
    """The first *batches* that have *size* records together."""
    for keys, records in batches:
        yield keys[:size], records[:size]
        size -= len(keys)
        if size <= 0:
            return


def _chosen(view: FeatureView, rows: pl.DataFrame, also: pl.Series, size: int) -> pl.DataFrame:
    """The rows of about *size* random entities, and of those whose entity key is in *also*."""
    parts = max(1, rows.select(view.join_keys).n_unique() // size)
    drawn = latest.shard(rows, view.join_keys, part=random.randrange(parts), parts=parts)  # noqa: S311 - a sample
    return pl.concat([drawn, _of(view, rows, also)]).unique("position").sort("position")


def _of(view: FeatureView, rows: pl.DataFrame, keys: pl.Series) -> pl.DataFrame:
    """The *rows* whose entity key is in *keys*."""
    return _named(view, rows).join(keys.to_frame("key"), on="key", how="semi").drop("key").sort("position")


def _named(view: FeatureView, rows: pl.DataFrame) -> pl.DataFrame:
    """*rows* with the entity key of each as ``key``."""
    return rows.with_columns(entity_keys(rows, view.join_keys).alias("key"))


def _read(view: FeatureView, store: OnlineStore, keys: list[bytes]) -> Iterable[tuple[list[bytes], list[bytes]]]:
    """The records of those *keys* that the store has."""
    for low in range(0, len(keys), AT_ONCE):
        some = keys[low : low + AT_ONCE]
        records = with_retry(partial(store.read, view.name, some))
        there = [(key, record) for key, record in zip(some, records, strict=True) if record is not None]
        yield [key for key, _ in there], [record for _, record in there]


# --- the comparison ----------------------------------------------------------------------------------------------------


def _compared(view: FeatureView, wanted: pl.DataFrame, held: pl.DataFrame, plan: Plan, now_us: int) -> pl.DataFrame:
    """Every entity that is wanted or seen by readers, with its ``problem``: one of PROBLEMS, "newer", or null."""
    both = wanted.join(held, on="key", how="full", coalesce=True, suffix="_held")
    due, due_held = pl.col("event_us"), pl.col("event_us_held")
    live = pl.col("live").fill_null(value=False)
    seen, soon = live, pl.lit(value=False)
    if view.ttl_us is not None:
        seen = live & ((due_held + view.ttl_us > now_us) | pl.col("body_held").is_null())
        soon = (due + view.ttl_us <= now_us + SKEW_US).fill_null(value=False)
    absent = due.is_null()
    older = (due_held < due) | ((due_held == due) & (pl.col("created_us_held") < pl.col("created_us")))
    columns = ("event_us", "created_us", "flags", "body")
    same = pl.all_horizontal(pl.col(name) == pl.col(f"{name}_held") for name in columns)
    problem = (
        pl.when(pl.col("version") > stamp(plan.generation, plan.to_version))
        .then(pl.lit("newer"))
        .when(absent & seen)
        .then(pl.lit("extra"))
        .when(~seen)
        .then(pl.lit("missing"))
        .when(pl.col("body_held").is_null())
        .then(pl.lit("wrong"))
        .when(older)
        .then(pl.lit("stale"))
        .when(~same)
        .then(pl.lit("wrong"))
    )
    return both.filter(~(absent & ~seen) & ~soon).with_columns(problem=problem)


def _without_ties(view: FeatureView, snapshot: Snapshot, rows: pl.DataFrame, found: pl.DataFrame) -> pl.DataFrame:
    """*found* without the entities that hold another row of the same commit and the same times: either may be served."""
    order = ["key", "event_us", "created_us"]
    suspects = found.filter(pl.col("problem") == "wrong", pl.col("body_held").is_not_null()).filter(
        pl.col("event_us") == pl.col("event_us_held"), pl.col("created_us") == pl.col("created_us_held")
    )
    if suspects.is_empty():
        return found
    tied = _named(view, rows).join(suspects, on=order, how="semi")
    tied = tied.with_columns(exact=snapshot.exact(tied)).filter(pl.len().over("key") > 1).sort("position")
    turns = tied.with_columns(turn=pl.int_range(pl.len()).over("key")).partition_by("turn", include_key=False)
    rivals = [tied.clear().select("key", "version", "exact").with_columns(flags=pl.lit(b""), body=pl.lit(0, pl.UInt64))]
    for candidates in turns:
        # One that cannot be stored has no record, and cannot be the latest.
        records = _wanted(snapshot, candidates.drop("key", "exact")).select("key", "flags", "body")
        rivals.append(candidates.select("key", "version", "exact").join(records, on="key"))
    latest_ones = pl.concat(rivals).filter(MAY_BE_LATEST.over("key"))
    right_on = ["key", "flags", "body"]
    same = suspects.join(latest_ones, left_on=["key", "flags_held", "body_held"], right_on=right_on, how="semi")
    return found.with_columns(problem=pl.when(~pl.col("key").is_in(same["key"].implode())).then("problem"))


# --- the repair --------------------------------------------------------------------------------------------------------


def _repair(
    view: FeatureView, store: OnlineStore, run: Run, snapshot: Snapshot, plan: Plan, found: pl.DataFrame
) -> int:
    """Write the snapshot's state of the entities that differ. Returns: how many were written or removed."""
    bad = found.filter(pl.col("problem").is_in(PROBLEMS))
    if bad.is_empty():
        return 0
    if bad.filter(pl.col("floor") >= stamp(plan.generation, plan.to_version)).is_empty():
        return _rewrite(view, store, run, snapshot, bad)
    with held_by(run, store, view.name, "repair") as run:  # noqa: PLR1704 - nothing here uses the other one
        return _rewrite(view, store, run, snapshot.in_new_generation(), bad)


def _rewrite(view: FeatureView, store: OnlineStore, run: Run, snapshot: Snapshot, bad: pl.DataFrame) -> int:
    gone = bad.filter(problem="extra")["key"].to_list()
    rows = _of(view, snapshot.rows.frame, bad.filter(pl.col("problem") != "extra")["key"])
    return snapshot.write(rows, run.progress) + remove(view, store, snapshot.work.plan, gone, run.now())
