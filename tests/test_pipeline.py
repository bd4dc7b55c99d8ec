"""Whole runs on real Delta tables: whatever happens between, the store ends with each entity's latest row."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from materialize import pipeline, watermark
from materialize.decoder import Header
from materialize.errors import MaterializeError, OnlineStoreError, RebuildNeeded, WatermarkError
from materialize.model import COUNTERS, Interval, RunReport, from_us, to_us
from materialize.online.memory import MemoryStore
from materialize.online.redis import RedisStore
from materialize.order import GENERATION, stamp
from materialize.pipeline import PieceReport, Run
from materialize.plan import Plan
from materialize.testing import CrashingStore, Row, make_batch
from tests.stepping import (
    Stepper,
    adds_up,
    amounts,
    incremental,
    interleavings,
    plan_of,
    play,
    position,
    records,
    run,
    served,
    vectors,
)
from tests.tables import NOW, Table, at, row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from materialize.online.base import OnlineStore


# --- one run after the other -------------------------------------------------------------------------------------------


def test_first_run_brings_the_latest_row_of_every_entity(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0), row("b", 5, 2.0), row("a", 3, 3.0))
    table.append(row("b", 4, 4.0), row("c", 1, math.nan, count=None, country=None))

    report = incremental(table, any_store)

    found = served(table.view, any_store)
    assert (found["a"]["amount"], found["b"]["amount"]) == (3.0, 2.0)
    assert math.isnan(found["c"].pop("amount"))
    assert found["c"] == {"count": None, "country": None}
    assert (report.from_version, report.to_version, report.rows_read, report.entities) == (None, 1, 5, 3)
    assert (report.written, report.deleted, report.event_us) == (3, 0, to_us(at(5)))
    assert adds_up(report)
    assert report.bytes > 100


def test_watermark_tells_where_the_run_ended(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1), row("b", 9))

    report = incremental(table, store, "run-7")

    found = watermark.read(store, "spending")
    assert found is not None
    assert (found.generation, found.version, found.table_id) == (1, 0, str(table.delta.metadata().id))
    assert (found.run_id, found.event_us, found.finished_us) == ("run-7", to_us(at(9)), to_us(NOW))
    assert found.counts == report.counts
    assert set(found.counts) == set(COUNTERS)


def test_nothing_new_changes_nothing(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1))
    incremental(table, any_store)
    before = records(table.view, any_store), any_store.read_cell("spending", "watermark")

    report = incremental(table, any_store, "second")

    assert (report.rows_read, report.entities, report.written, report.changed) == (0, 0, 0, False)
    assert (report.from_version, report.to_version) == (0, 0)
    assert (records(table.view, any_store), any_store.read_cell("spending", "watermark")) == before


def test_head_moved_by_optimize_alone_moves_the_watermark_and_reads_nothing(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1))
    table.append(row("b", 1))
    incremental(table, store)
    table.delta.optimize.compact()

    report = incremental(table, store)

    assert (report.rows_read, report.written, report.changed) == (0, 0, False)
    assert position(table, store) == (1, 2)
    assert watermark.read(store, "spending").event_us == to_us(at(1))  # type: ignore[union-attr]


def test_only_what_is_new_is_read(table: Table, any_store: OnlineStore) -> None:
    table.append(*(row(f"u{index}", index) for index in range(100)))
    incremental(table, any_store)
    table.append(row("u1", 500, 5.0), row("new", 1, 6.0))
    table.append(row("u1", 501, 7.0))

    report = incremental(table, any_store)

    assert (report.rows_read, report.entities, report.written) == (3, 2, 2)
    assert (report.from_version, report.to_version) == (0, 2)
    found = amounts(table, any_store)
    assert (found["u1"], found["new"], len(found)) == (7.0, 6.0, 101)


def test_late_row_of_a_known_entity_is_stale_and_of_a_new_one_arrives(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 100, 1.0))
    incremental(table, any_store)
    table.append(row("a", 50, 2.0), row("b", -100_000, 3.0))

    report = incremental(table, any_store)

    assert (report.stale, report.written) == (1, 1)
    assert adds_up(report)
    assert amounts(table, any_store) == {"a": 1.0, "b": 3.0}
    assert watermark.read(any_store, "spending").event_us == to_us(at(100))  # type: ignore[union-attr]


def test_correction_with_the_same_event_time_wins_by_its_created_time(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0, created=10))
    incremental(table, any_store)
    table.append(row("a", 1, 2.0, created=11), row("a", 1, 3.0, created=9))

    incremental(table, any_store)

    assert amounts(table, any_store) == {"a": 2.0}


def test_correction_with_equal_times_wins_by_its_later_commit(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0))
    incremental(table, any_store)
    table.append(row("a", 1, 2.0))

    report = incremental(table, any_store)

    assert report.written == 1
    assert amounts(table, any_store) == {"a": 2.0}


def test_older_backfill_changes_nothing(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0), row("b", 2, 2.0))
    table.append(row("a", 100, 3.0), row("b", 101, 4.0))
    incremental(table, any_store)
    before = records(table.view, any_store), any_store.read_cell("spending", "watermark")

    report = pipeline.backfill(table.view, any_store, run("fill"), Interval(at(0), at(60)))

    assert (report.mode, report.rows_read, report.stale, report.written) == ("backfill", 2, 2, 0)
    assert adds_up(report)
    assert (records(table.view, any_store), any_store.read_cell("spending", "watermark")) == before


def test_backfill_of_what_is_stored_is_unchanged_and_never_wins_a_tie(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0))
    incremental(table, any_store)
    table.append(row("a", 1, 2.0))

    report = pipeline.backfill(table.view, any_store, run(), Interval(at(0), at(60)))

    assert (report.unchanged, report.written) == (1, 0)
    assert amounts(table, any_store) == {"a": 1.0}
    incremental(table, any_store)
    assert amounts(table, any_store) == {"a": 2.0}


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 1, 0]])
def test_tie_in_a_backfill_goes_to_the_later_commit_whatever_piece_is_written_first(
    table: Table, store: OnlineStore, order: list[int]
) -> None:
    for amount in (1.0, 2.0, 3.0):
        table.append(*(row(user, 1, amount) for user in "abcdef"))
    plan = plan_of(table, store, "backfill", interval=Interval(at(0), at(60)))
    plan = pipeline.begin(table.view, store, replace(plan, pieces=3))

    reports = [pipeline.write_piece(table.view, store, plan, piece, now=NOW) for piece in order]

    assert amounts(table, store) == dict.fromkeys("abcdef", 3.0)
    assert sum(report.written for report in reports) == 6


def test_backfill_takes_the_start_and_leaves_the_end(table: Table, store: OnlineStore) -> None:
    table.append(
        row("before", 59.999999), row("start", 60), row("last", 119.999999), row("end", 120), row("none", None)
    )
    assert not amounts(table, store)

    report = pipeline.backfill(table.view, store, run(), Interval(at(60), at(120)))

    assert report.written == 2
    assert set(amounts(table, store)) == {"start", "last"}
    assert store.read_cell("spending", "watermark") is None
    assert report.interval == f"[{at(60).isoformat()}, {at(120).isoformat()})"


def test_backfill_of_an_interval_without_files_does_nothing(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1))

    report = pipeline.backfill(table.view, store, run(), Interval(at(10_000), at(20_000)))

    assert (report.rows_read, report.entities) == (0, 0)


def test_first_run_after_a_backfill_still_ends_at_the_latest_rows(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0))
    pipeline.backfill(table.view, any_store, run(), Interval(at(0), at(60)))
    table.append(row("a", 1, 2.0), row("b", 2, 3.0))

    incremental(table, any_store)

    assert amounts(table, any_store) == {"a": 2.0, "b": 3.0}


def test_table_dropped_and_recreated_is_rebuilt_although_versions_begin_again(
    table: Table, any_store: OnlineStore
) -> None:
    for minute in range(4):
        table.append(row("a", 100 + minute, 1.0), row(f"old{minute}", 1))
    incremental(table, any_store)
    for file in sorted(table.path.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    table.append(row("a", 1, 7.0))
    with pytest.raises(RebuildNeeded, match="dropped and created again"):
        incremental(table, any_store)

    report = pipeline.rebuild(table.view, any_store, run())

    assert amounts(table, any_store) == {"a": 7.0}
    assert (report.deleted, position(table, any_store)) == (4, (2, 0))
    table.append(row("a", 2, 8.0))
    assert incremental(table, any_store).written == 1


def test_empty_table_is_loaded_and_followed(table: Table, any_store: OnlineStore) -> None:
    table.create()
    report = incremental(table, any_store)
    assert (report.rows_read, report.written, position(table, any_store)) == (0, 0, (1, 0))

    table.append(row("a", 1, 1.0))
    incremental(table, any_store)

    assert amounts(table, any_store) == {"a": 1.0}


def test_lost_store_is_noticed_and_filled_again(table: Table, valkey: Any) -> None:
    table.append(row("a", 1, 1.0), row("b", 1, 2.0))
    with RedisStore(valkey.url) as store:
        incremental(table, store)
        valkey.client.flushall()

        report = incremental(table, store)

        assert (report.from_version, report.written) == (None, 2)
        assert amounts(table, store) == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("left", [stamp(7, 3), stamp(1, 900)])
def test_lost_watermark_with_remnants_of_a_higher_version_ends_right(
    table: Table, any_store: OnlineStore, left: int
) -> None:
    table.append(row("a", 1, 1.0), row("b", 1, 2.0))
    watermark.register_schema(any_store, table.view)
    remnants = [Row(key, to_us(at(9_999)), to_us(at(9_999)), left, b"remnant") for key in (b"a", b"gone")]
    retention = table.view.retention(NOW)
    any_store.replace("spending", make_batch(remnants, floor=left), at=left, retention=retention)

    report = incremental(table, any_store)

    assert amounts(table, any_store) == {"a": 1.0, "b": 2.0}
    assert (report.deleted, position(table, any_store)[0]) == (1, left // GENERATION + 1)
    table.append(row("a", 2, 3.0))
    incremental(table, any_store)
    assert amounts(table, any_store)["a"] == 3.0


# --- rows that cannot be stored, or need not be ------------------------------------------------------------------------


def test_every_reason_for_quarantine_is_counted_once(table: Table, any_store: OnlineStore) -> None:
    table.append(
        row("good", 1),
        row(None, 1),
        row(None, None),
        row("", 1),
        row("k" * 3_000, 1),
        row("null time", None),
        row("far", 60 * 24 * 400),
        row("old", -60 * 24 * 365 * 500),
        row("created", 1, created=60 * 24 * 365 * 200),
        row("huge", 1, country="x" * 2_000_000),
    )

    report = incremental(table, any_store)

    reasons = report.quarantine_reasons
    assert reasons == {
        "null join key": 2,
        "empty join key": 1,
        "entity key longer than 2,048 bytes": 1,
        "null event timestamp": 1,
        next(
            reason for reason in reasons if re.fullmatch(r"event timestamp more than 1 ?d.* in the future", reason)
        ): 1,
        "event timestamp before 1684": 1,
        "created timestamp outside 1684 to 2255": 1,
        next(reason for reason in reasons if reason.startswith("record longer")): 1,
    }
    assert (report.rows_read, report.quarantined, report.entities, report.written) == (10, 9, 1, 1)
    assert adds_up(report)
    assert set(amounts(table, any_store)) == {"good"}


def test_older_row_is_served_where_the_latest_cannot_be_stored(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0), row("a", 2, 2.0), row("a", 3, 3.0, country="x" * 2_000_000), row("b", 1, 4.0))
    table.append(row("c", 5, 5.0, country="y" * 2_000_000), row("c", 4, 6.0, country="y" * 2_000_000))

    report = incremental(table, store)

    assert amounts(table, store) == {"a": 2.0, "b": 4.0}
    assert (report.quarantined, report.entities, report.written, report.rows_read) == (3, 2, 2, 6)


def test_expired_older_row_of_an_unstorable_latest_one_counts_as_expired(table: Table, any_store: OnlineStore) -> None:
    day = 60 * 24
    table.change_view(ttl=timedelta(days=3))
    table.append(row("a", 1, 1.0), row("a", 8 * day, 2.0, country="x" * 2_000_000), row("b", 1, 3.0))

    report = incremental(table, any_store)

    assert (report.quarantined, report.expired, report.written, report.entities) == (1, 2, 0, 2)
    assert adds_up(report)
    assert amounts(table, any_store) == {}


def test_expired_rows_are_counted_and_not_written(table: Table, store: OnlineStore) -> None:
    day = 60 * 24
    table.change_view(ttl=timedelta(days=3))
    table.append(row("old", 1), row("edge", 6 * day), row("fresh", 6 * day + 1), row("fresh", 2))

    report = incremental(table, store)

    assert (report.expired, report.written, report.entities, report.rows_read) == (2, 1, 3, 4)
    assert adds_up(report)
    assert set(amounts(table, store)) == {"fresh"}


def test_readers_see_a_row_expire_by_its_event_time_and_purge_takes_it(table: Table, store: OnlineStore) -> None:
    day = 60 * 24
    table.change_view(ttl=timedelta(days=3))
    table.append(row("a", 8 * day, 1.0))
    incremental(table, store)

    statuses = [
        vectors(table.view, store, ["a"], now=at(8 * day) + timedelta(days=3, seconds=late))[0].status
        for late in (-1, 0, 1)
    ]

    assert statuses == ["present", "expired", "expired"]
    pipeline.incremental(table.view, store, run("later", at(30 * day)))
    assert amounts(table, store) == {}


def test_entity_that_expired_is_not_counted_as_deleted_by_a_rebuild(table: Table, store: OnlineStore) -> None:
    day = 60 * 24
    table.change_view(ttl=timedelta(days=3))
    table.append(row("a", 8 * day, 1.0), row("b", 8 * day, 1.0))
    incremental(table, store)

    report = pipeline.rebuild(table.view, store, run("later", at(12 * day)))

    assert (report.expired, report.deleted, report.written) == (2, 0, 0)


# --- pieces ------------------------------------------------------------------------------------------------------------


def filled(table: Table) -> dict[str, float]:
    """Eight commits with ties and several rows per entity; what must be online."""
    newest: dict[str, tuple[float, int, float]] = {}
    for commit in range(8):
        rows = [(f"u{(7 * index + commit) % 60}", (index * 31 + commit * 17) % 40) for index in range(50)]
        chosen = {
            user: (minute, commit, float(commit * 100 + index))
            for index, (user, minute) in enumerate(dict(rows).items())
        }
        table.append(*(row(user, minute, amount) for user, (minute, _, amount) in chosen.items()))
        newest |= {user: max(value, newest.get(user, value)) for user, value in chosen.items()}
    return {user: amount for user, (_, _, amount) in newest.items()}


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 64])
def test_pieces_in_any_order_and_repeated_end_alike(table: Table, store: OnlineStore, pieces: int) -> None:
    table.create()
    incremental(table, store)
    expected = filled(table)
    plan = pipeline.begin(table.view, store, replace(plan_of(table, store), pieces=pieces))
    order = [*reversed(range(pieces)), 0, pieces // 2]
    done = {piece: pipeline.write_piece(table.view, store, plan, piece, now=NOW) for piece in order}

    report = pipeline.commit(table.view, store, plan, list(done.values()), now=NOW)

    assert amounts(table, store) == expected
    assert adds_up(report)
    assert report.rows_read == sum(piece.rows_read for piece in done.values()) == plan.rows
    assert position(table, store) == (1, 8)


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 64])
def test_pieces_of_a_snapshot_are_cut_between_entities(table: Table, store: OnlineStore, pieces: int) -> None:
    expected = filled(table)
    plan = pipeline.begin(table.view, store, replace(plan_of(table, store), pieces=pieces))
    reports = [pipeline.write_piece(table.view, store, plan, piece, now=NOW) for piece in reversed(range(pieces))]
    repeated = [pipeline.write_piece(table.view, store, plan, piece, now=NOW) for piece in range(pieces)]

    report = pipeline.commit(table.view, store, plan, reports, now=NOW)

    assert amounts(table, store) == expected
    assert report.written == report.entities == len(expected)
    assert sum(piece.unchanged for piece in repeated) == len(expected)
    assert report.rows_read == plan.rows


def test_commit_wants_every_piece(table: Table, store: OnlineStore) -> None:
    filled(table)
    plan = pipeline.begin(table.view, store, replace(plan_of(table, store), pieces=3))

    with pytest.raises(MaterializeError, match="found 1 written pieces, expected 3"):
        pipeline.commit(table.view, store, plan, [PieceReport()], now=NOW)

    assert position(table, store) == (1, None)


def test_commit_again_is_harmless(table: Table, store: OnlineStore) -> None:
    filled(table)
    plan = pipeline.begin(table.view, store, plan_of(table, store))
    pieces = [pipeline.write_piece(table.view, store, plan, 0, now=NOW)]
    first = pipeline.commit(table.view, store, plan, pieces, now=NOW)
    before = store.read_cell("spending", "watermark")

    second = pipeline.commit(table.view, store, plan, pieces, now=NOW)

    assert store.read_cell("spending", "watermark") == before
    assert replace(second, seconds=0.0, timings={}) == replace(first, seconds=0.0, timings={})


def test_plan_and_piece_report_survive_json(table: Table, store: OnlineStore) -> None:
    filled(table)
    for plan in (
        plan_of(table, store),
        pipeline.begin(table.view, store, plan_of(table, store)),
        plan_of(table, store, "backfill", interval=Interval(at(0), at(60))),
        plan_of(table, store, "rebuild"),
    ):
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        assert len(plan.piece_labels) == plan.pieces
    plan = pipeline.begin(table.view, store, plan_of(table, store))
    report = pipeline.write_piece(table.view, store, plan, 0, now=NOW)
    assert PieceReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_snapshot_pieces_of_another_engine_are_refused(table: Table, store: OnlineStore) -> None:
    filled(table)
    plan = pipeline.begin(table.view, store, replace(plan_of(table, store), pieces=2, engine="polars 0.1"))

    with pytest.raises(MaterializeError, match=r"planned with polars 0\.1"):
        pipeline.write_piece(table.view, store, plan, 0, now=NOW)


def test_table_recreated_between_plan_and_write_is_noticed(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1))
    plan = pipeline.begin(table.view, store, plan_of(table, store))
    for file in sorted(table.path.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    table.append(row("b", 1))

    with pytest.raises(RebuildNeeded, match="dropped and created again during the run"):
        pipeline.write_piece(table.view, store, plan, 0, now=NOW)


def test_progress_hears_of_every_entity(table: Table, store: OnlineStore) -> None:
    expected = filled(table)
    heard: list[int] = []

    pipeline.incremental(table.view, store, Run("default", "run", lambda: NOW, heard.append))

    assert sum(heard) == len(expected)


def test_planning_writes_nothing(table: Table, store: OnlineStore) -> None:
    filled(table)

    plan_of(table, store)
    plan_of(table, store, "rebuild")

    assert records(table.view, store) == {}
    assert store.read_cell("spending", "watermark") is None
    assert store.read_cell("spending", "schemas") is None


# --- runs that overlap -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", ["incremental+incremental", "incremental+rebuild", "rebuild+rebuild"])
@pytest.mark.parametrize("loaded", [False, True], ids=["first", "later"])
def test_two_overlapping_runs_end_right_in_every_interleaving(tmp_path: Path, modes: str, *, loaded: bool) -> None:
    table = Table(tmp_path / "t")
    table.append(row("a", 1, 1.0), row("b", 1, 2.0), row("c", 9, 3.0))
    begun = MemoryStore()
    if loaded:
        incremental(table, begun, "before")
    table.append(row("a", 5, 5.0), row("b", 1, 6.0), row("d", 1, 7.0))
    table.append(row("a", 5, 8.0))
    for number, order in enumerate(interleavings()):
        with MemoryStore() as store:
            store.content.records |= begun.content.records
            store.content.cells |= begun.content.cells
            store.content.due |= begun.content.due
            x, y = (Stepper(table, store, mode, name) for mode, name in zip(modes.split("+"), "xy", strict=True))

            play(order, x, y, {})

            context = f"{number} {''.join(order)}"
            errors = [run.error for run in (x, y) if run.error is not None]
            assert all(isinstance(error, WatermarkError) for error in errors), context
            assert len(errors) < 2, context
            assert amounts(table, store) == {"a": 8.0, "b": 6.0, "c": 3.0, "d": 7.0}, context
            assert position(table, store)[1] == table.version, context
            assert incremental(table, store, "after").rows_read == 0, context


def test_run_that_is_overtaken_by_a_longer_one_loses_and_harms_nothing(tmp_path: Path) -> None:
    for number, order in enumerate(interleavings()):
        table = Table(tmp_path / f"t{number}")
        table.append(row("a", 1, 1.0), row("b", 1, 2.0))
        with MemoryStore() as store:
            incremental(table, store, "before")
            table.append(row("a", 5, 5.0))
            x, y = Stepper(table, store, "incremental", "x"), Stepper(table, store, "incremental", "y")

            play(
                order, x, y, {4: lambda table=table: table.append(row("a", 6, 6.0), row("b", 0, 0.0), row("c", 1, 1.0))}
            )  # type: ignore[misc]
            incremental(table, store, "after")

            assert amounts(table, store) == {"a": 6.0, "b": 2.0, "c": 1.0}, "".join(order)
            errors = [type(run.error) for run in (x, y) if run.error is not None]
            assert set(errors) <= {WatermarkError}, "".join(order)


# --- runs that die -----------------------------------------------------------------------------------------------------


def prepared(
    tmp_path: Path, mode: str
) -> tuple[Table, Callable[[OnlineStore], None], Callable[[OnlineStore, str], RunReport]]:
    """A table, what brings a store to where the run begins, and the run."""
    table = Table(tmp_path / "t")
    table.append(*(row(f"u{index}", index % 7, float(index)) for index in range(40)))

    def before(store: OnlineStore) -> None:
        if mode != "first":
            pinned = table.log_file(1).rename(table.path / "hidden")
            later = [table.log_file(2).rename(table.path / "hidden2")]
            incremental(table, store, "before")
            pinned.rename(table.log_file(1))
            later[0].rename(table.log_file(2))

    table.append(*(row(f"u{index}", 3 + index % 5, 100.0 + index) for index in range(20, 60)))
    table.append(row("u1", 1, 7.0), row("new", 1, 8.0))

    def work(store: OnlineStore, run_id: str) -> RunReport:
        if mode == "rebuild":
            return pipeline.rebuild(table.view, store, run(run_id))
        if mode == "backfill":
            return pipeline.backfill(table.view, store, run(run_id), Interval(at(0), at(5)))
        return incremental(table, store, run_id)

    return table, before, work


def comparable(table: Table, store: OnlineStore, *, generations: bool) -> tuple[Any, ...]:
    """Everything of a store that two ways to one end must agree on; *generations*: version and floor too."""
    found = watermark.read(store, table.view.name)
    heads = {}
    for key, record in records(table.view, store).items():
        header = Header.unpack(record)
        order = (
            (header.version, header.floor) if generations else (header.version % GENERATION, header.floor % GENERATION)
        )
        heads[key] = (header.flags, header.schema_id, header.event_us, header.created_us, *order, record[36:])
    place = (
        None
        if found is None
        else (found.generation if generations else 0, found.version, found.table_id, found.schema, found.event_us)
    )
    return heads, place, store.read_cell(table.view.name, "schemas")


@pytest.mark.parametrize("effect", [False, True], ids=["lost", "done"])
@pytest.mark.parametrize("mode", ["first", "incremental", "backfill", "rebuild"])
def test_run_that_dies_at_any_write_and_runs_again_ends_as_an_uninterrupted_one(
    tmp_path: Path, mode: str, *, effect: bool
) -> None:
    table, before, work = prepared(tmp_path, mode)
    with MemoryStore() as calm:
        before(calm)
        work(calm, "calm")
        expected = comparable(table, calm, generations=mode != "rebuild")
    for after in range(1, 50):
        with MemoryStore() as store:
            before(store)
            crashing = CrashingStore(store, after=after, effect=effect, error=OnlineStoreError)
            try:
                work(crashing, "dies")
            except OnlineStoreError:
                pass
            else:
                assert after >= 2
                assert comparable(table, store, generations=mode != "rebuild") == expected
                break
            work(store, "again")

            assert comparable(table, store, generations=mode != "rebuild") == expected, f"died at write {after}"
    else:
        pytest.fail("the run never came to its end")


def test_run_that_dies_before_its_end_leaves_the_watermark_behind(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0))
    incremental(table, store)
    table.append(row("a", 2, 2.0))

    with pytest.raises(OnlineStoreError):
        incremental(table, CrashingStore(store, after=2, effect=False, error=OnlineStoreError))

    assert position(table, store) == (1, 0)
    assert amounts(table, store) == {"a": 2.0}


def test_dead_first_run_is_finished_by_the_next_incremental_one(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0), row("b", 1, 2.0))
    with pytest.raises(OnlineStoreError):
        incremental(table, CrashingStore(store, after=4, effect=False, error=OnlineStoreError), "dies")
    assert position(table, store) == (1, None)
    table.delta.delete("user_id = 'b'")

    report = incremental(table, store, "again")

    assert "did not finish" in report.reason
    assert amounts(table, store) == {"a": 1.0}
    assert position(table, store) == (1, 1)


def test_records_of_merged_rows_carry_their_commit_and_of_a_snapshot_its_version_and_floor(
    table: Table, store: OnlineStore
) -> None:
    table.append(row("a", 1))
    table.append(row("b", 1))
    incremental(table, store)
    table.append(row("c", 1))
    table.append(row("d", 1))
    incremental(table, store)

    heads = {key: Header.unpack(record) for key, record in records(table.view, store).items()}

    assert {key: (head.version, head.floor) for key, head in heads.items()} == {
        b"a": (stamp(1, 1), stamp(1, 1)),
        b"b": (stamp(1, 1), stamp(1, 1)),
        b"c": (stamp(1, 2), stamp(1, 1)),
        b"d": (stamp(1, 3), stamp(1, 1)),
    }
    assert from_us(heads[b"a"].event_us) == at(1)
