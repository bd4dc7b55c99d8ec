"""Whole runs over tables whose rows go and change: the store follows exactly, and nothing that is gone comes back."""

from __future__ import annotations

import random
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from materialize import pipeline, watermark
from materialize.decoder import Header
from materialize.errors import MaterializeError, OnlineStoreError, RebuildNeeded, WatermarkError
from materialize.model import Interval, to_us
from materialize.online.memory import MemoryStore
from materialize.order import stamp
from materialize.testing import CrashingStore
from tests.offline import fields_of, metadata, path_in_log, removal, rewrite, vacuum, with_fields
from tests.stepping import (
    Stepper,
    adds_up,
    amounts,
    expected_amounts,
    in_pieces,
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
from tests.tables import NOW, SCHEMA, Table, at, row

if TYPE_CHECKING:
    from pathlib import Path

    from materialize.online.base import OnlineStore

DAY = 24 * 60

#: A value that no compression makes small: twenty of them in a table that is rewritten are more changes than are compared.
LONG = random.Random(0).randbytes(400_000).hex()


def write_late(table: Table, store: OnlineStore, plan: pipeline.Plan) -> None:
    """What a process writes that was stopped after it had begun its run, and goes on now; it cannot commit."""
    late = [pipeline.write_piece(table.view, store, plan, piece, now=NOW) for piece in range(plan.pieces)]
    if plan.mode != "backfill":
        with pytest.raises(WatermarkError):
            pipeline.commit(table.view, store, plan, late, now=NOW)


def recreate(table: Table) -> None:
    for file in sorted(table.path.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()


# --- rows that go ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", [False, True], ids=["rewritten", "deletion vector"])
def test_deleted_entities_leave_by_the_next_run_and_stay_away(
    table: Table, any_store: OnlineStore, *, vector: bool
) -> None:
    table.append(row("a", 1, 1.0), row("b", 2, 2.0), row("c", 3, 3.0))
    incremental(table, any_store)
    table.append(row("b", 9, 9.0))
    zombie = pipeline.begin(table.view, any_store, plan_of(table, any_store, run_id="zombie"))
    interval = Interval(at(0), at(60))
    filling = pipeline.begin(table.view, any_store, plan_of(table, any_store, "backfill", interval=interval))
    if vector:
        table.delete_rows(path_in_log(table, 0), [1])
        table.delete_rows(path_in_log(table, 1), [0])
    else:
        table.delta.delete("user_id = 'b'")

    report = incremental(table, any_store)

    assert (report.deleted, report.written, report.rows_read, report.changed) == (1, 0, 0, True)
    assert (adds_up(report), position(table, any_store)) == (True, (1, table.version))
    assert amounts(table, any_store) == {"a": 1.0, "c": 3.0}
    assert [vector.status for vector in vectors(table.view, any_store, ["b"])] == ["missing"]
    write_late(table, any_store, zombie)
    write_late(table, any_store, filling)
    pipeline.backfill(table.view, any_store, run(), interval)
    assert amounts(table, any_store) == {"a": 1.0, "c": 3.0}
    assert not incremental(table, any_store).changed


def test_deleted_entity_comes_back_with_a_new_row(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 50, 1.0), row("b", 2, 2.0))
    incremental(table, any_store)
    table.delta.delete("user_id = 'a'")
    incremental(table, any_store)
    table.append(row("a", 3, 3.0))

    report = incremental(table, any_store)

    assert report.written == 1
    assert amounts(table, any_store) == {"a": 3.0, "b": 2.0}


def test_entity_that_loses_its_latest_row_gets_the_one_before(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0), row("b", 1, 2.0))
    table.append(row("a", 5, 5.0), row("b", 5, 6.0))
    incremental(table, any_store)
    table.delta.delete("amount = 5.0")

    report = incremental(table, any_store)

    assert amounts(table, any_store) == {"a": 1.0, "b": 6.0}
    assert (report.written, report.deleted, report.rows_read) == (1, 0, 1)


def test_entity_that_loses_an_older_row_keeps_its_latest_one(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0))
    table.append(row("a", 5, 5.0))
    incremental(table, any_store)
    table.delta.delete("amount = 1.0")

    incremental(table, any_store)

    assert amounts(table, any_store) == {"a": 5.0}


def test_update_to_an_older_event_time_is_followed(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 50, 1.0), row("b", 50, 2.0))
    incremental(table, any_store)
    older = {"event_timestamp": "to_timestamp('2095-01-01T00:00:00Z')", "amount": "7.0"}
    table.delta.update(updates=older, predicate="user_id = 'a'")

    report = incremental(table, any_store)

    assert (report.written, report.rows_read, amounts(table, any_store)) == (1, 1, {"a": 7.0, "b": 2.0})
    assert Header.unpack(records(table.view, any_store)[b"a"]).event_us == to_us(at(0))


@pytest.mark.parametrize("how", ["incremental", "rebuild"])
def test_restore_brings_back_older_values(table: Table, any_store: OnlineStore, how: str) -> None:
    table.append(row("a", 1, 1.0))
    table.append(row("a", 100, 2.0), row("b", 1, 5.0))
    incremental(table, any_store)
    table.delta.restore(0)

    report = incremental(table, any_store) if how == "incremental" else pipeline.rebuild(table.view, any_store, run())

    assert report.deleted == 1
    assert amounts(table, any_store) == {"a": 1.0}


def test_delete_and_restore_in_one_window_end_where_they_began(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0), row("b", 1, 2.0))
    incremental(table, any_store)
    table.delta.delete("user_id = 'a'")
    table.delta.restore(0)

    report = incremental(table, any_store)

    assert (report.deleted, amounts(table, any_store)) == (0, {"a": 1.0, "b": 2.0})


def test_overwritten_table_is_followed(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 50, 1.0), row("b", 1, 2.0), row("c", 1, 3.0))
    incremental(table, any_store)
    table.append(row("a", 1, 4.0), row("c", 1, 3.0), row("d", 1, 5.0), mode="overwrite")

    report = incremental(table, any_store)

    assert amounts(table, any_store) == {"a": 4.0, "c": 3.0, "d": 5.0}
    assert (report.written, report.deleted, report.rows_read) == (2, 1, 2)


def test_everything_can_be_deleted(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1), row("b", 1))
    incremental(table, any_store)
    table.delta.delete()

    report = pipeline.incremental(table.view, any_store, run(force=True))

    assert (report.deleted, amounts(table, any_store), position(table, any_store)) == (2, {}, (1, 1))


def test_entity_that_moves_to_another_key_leaves_the_old_one(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0), row("b", 1, 2.0))
    incremental(table, store)
    table.delta.update(updates={"user_id": "'z'"}, predicate="user_id = 'a'")

    report = incremental(table, store)

    assert (report.written, report.deleted, amounts(table, store)) == (1, 1, {"b": 2.0, "z": 1.0})


@pytest.mark.parametrize("partition_by", [[], ["number"]])
def test_entities_are_found_again_after_their_key_got_a_wider_type(
    tmp_path: Path, store: OnlineStore, partition_by: list[str]
) -> None:
    table = Table(tmp_path / "t", schema=pa.schema([*SCHEMA, ("number", pa.int32())]))
    table.change_view(join_keys=("number",))
    table.create(partition_by=partition_by)
    for number in range(4):
        table.append(row("x", 1, 1.0, number=number), row("x", 5, 5.0, number=number - 100))
    for number in range(4):
        table.append(row("x", 5, 7.0, number=number))
    incremental(table, store)
    listed = {"readerFeatures": ["typeWidening"], "writerFeatures": ["typeWidening"]}
    meta = metadata(table)
    wider = [field | {"type": "long"} if field["name"] == "number" else field for field in fields_of(meta)]
    protocol = {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **listed}}
    table.commit(protocol, with_fields(meta, wider))
    (gone,) = (action["add"] for action in table.actions(6) if "add" in action)
    table.commit(removal({"add": gone}))

    report = incremental(table, store)

    assert amounts(table, store) == expected_amounts(table)
    assert amounts(table, store)["1"] == 1.0
    assert (report.written, position(table, store)) == (1, (1, 10))


@pytest.mark.parametrize("names", [("z", "a"), ("a", "z")])
def test_tie_in_an_entity_that_lost_a_row_goes_to_the_later_commit(
    table: Table, store: OnlineStore, names: tuple[str, str]
) -> None:
    table.create()
    for name, amount in zip(names, (1.0, 2.0), strict=True):
        table.commit(table.add_file(f"{name}.parquet", table.arrow([row("a", 1, amount)])))
    gone = table.add_file("m.parquet", table.arrow([row("a", 5, 5.0), row("b", 1, 3.0)]))
    table.commit(gone)
    incremental(table, store)
    rewrite(table, gone, "n.parquet", row("b", 1, 3.0))

    incremental(table, store)

    assert amounts(table, store) == {"a": 2.0, "b": 3.0}


def test_counters_of_a_run_with_removals_add_up(table: Table, any_store: OnlineStore) -> None:
    for user in "abcde":
        table.append(row(user, 1, 1.0))
    incremental(table, any_store)
    table.append(row("f", 2, 2.0))
    table.append(row("e", 0, 9.0))
    table.delta.update(updates={"amount": "3.0"}, predicate="user_id = 'b'")
    table.delta.delete("user_id = 'c'")

    report = incremental(table, any_store)

    assert amounts(table, any_store) == {"a": 1.0, "b": 3.0, "d": 1.0, "e": 1.0, "f": 2.0}
    assert (report.rows_read, report.entities, report.written, report.stale) == (3, 3, 2, 1)
    assert (report.deleted, report.quarantined, report.changed, adds_up(report)) == (1, 0, True, True)
    found = watermark.read(any_store, "spending")
    assert found is not None
    assert found.counts == report.counts


def test_runner_up_is_served_where_the_row_that_is_left_cannot_be_stored(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0), row("b", 1, 2.0))
    table.append(row("a", 3, 3.0, country="x" * 2_000_000), row("c", 3, 3.0, country="x" * 2_000_000))
    table.append(row("a", 5, 5.0), row("c", 5, 5.0))
    incremental(table, store)
    assert amounts(table, store) == {"a": 5.0, "b": 2.0, "c": 5.0}
    table.delta.delete("amount = 5.0")

    report = incremental(table, store)

    assert amounts(table, store) == {"a": 1.0, "b": 2.0}
    assert (report.deleted, report.written, report.quarantined, adds_up(report)) == (1, 1, 2, True)


def test_entity_whose_row_that_is_left_expired_is_gone(table: Table, store: OnlineStore) -> None:
    table.change_view(ttl=timedelta(days=3))
    table.append(row("a", 1, 1.0), row("b", 8 * DAY, 2.0))
    table.append(row("a", 8 * DAY, 5.0))
    incremental(table, store)
    table.delta.delete("amount = 5.0")

    report = incremental(table, store)

    assert (report.expired, report.deleted, report.written, adds_up(report)) == (1, 1, 0, True)
    assert amounts(table, store) == {"b": 2.0}


def test_expired_entity_that_loses_its_row_does_not_count_as_deleted(table: Table, store: OnlineStore) -> None:
    table.change_view(ttl=timedelta(days=3))
    table.append(row("a", 8 * DAY, 1.0), row("b", 8 * DAY, 1.0))
    incremental(table, store)
    table.delta.delete("user_id = 'a'")

    report = pipeline.incremental(table.view, store, run("later", at(12 * DAY)))

    assert (report.deleted, report.changed) == (0, False)


def test_deleted_rows_that_could_never_be_stored_are_harmless(table: Table, store: OnlineStore) -> None:
    odd = [row(None, 1), row("", 1), row("k" * 3_000, 1), row("late", None), row("a", 1)]
    table.append(*odd, row("b", 1, 2.0))
    incremental(table, store)
    table.append(row("b", 1, 2.0), mode="overwrite")

    report = incremental(table, store)

    assert (report.deleted, report.quarantined, amounts(table, store)) == (1, 0, {"b": 2.0})


# --- the way over the snapshot -----------------------------------------------------------------------------------------


def test_many_rewrites_of_a_table_are_read_as_its_snapshot(table: Table, any_store: OnlineStore) -> None:
    table.append(*(row(f"u{index}", 1, float(index), country=f"{index}{LONG[index:]}") for index in range(20)))
    incremental(table, any_store)
    for index in range(6):
        table.delta.update(updates={"amount": f"{100.0 + index}"}, predicate=f"user_id = 'u{index}'")
    table.delta.delete("user_id = 'u7'")
    plan = plan_of(table, any_store)
    assert (plan.snapshot, plan.generation, plan.from_version) == (True, 1, None)
    assert plan.reason.startswith("the changes have ")

    report = incremental(table, any_store)

    expected = {f"u{index}": 100.0 + index if index < 6 else float(index) for index in range(20) if index != 7}
    assert amounts(table, any_store) == expected
    assert (report.deleted, report.reason, adds_up(report)) == (1, plan.reason, True)
    assert position(table, any_store) == (1, table.version)


def test_rebuild_that_is_needed_stops_the_run_unless_the_view_says_auto(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 50, 1.0), row("b", 2, 2.0), row("c", 3, 3.0))
    incremental(table, any_store)
    table.delta.delete("user_id = 'b'")
    table.append(row("a", 1, 4.0), row("c", 3, 3.0), mode="overwrite")
    vacuum(table)
    before = records(table.view, any_store), any_store.read_cell("spending", "watermark")
    with pytest.raises(RebuildNeeded, match="that were removed since are vacuumed"):
        incremental(table, any_store)
    assert (records(table.view, any_store), any_store.read_cell("spending", "watermark")) == before
    table.change_view(on_rebuild_needed="auto")
    reason = plan_of(table, any_store).reason
    assert reason == "rebuild was needed: 2 data files that were removed since are vacuumed"

    report = incremental(table, any_store)

    assert (report.reason, report.deleted, position(table, any_store)) == (reason, 1, (2, table.version))
    assert amounts(table, any_store) == {"a": 4.0, "c": 3.0}
    table.append(row("a", 2, 5.0))
    assert incremental(table, any_store).reason == f"from the watermark at version {table.version - 1}"
    assert amounts(table, any_store)["a"] == 5.0


def test_recreated_table_is_followed_if_the_view_says_auto(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 50, 1.0), row("b", 2, 2.0))
    table.append(row("a", 60, 1.0))
    incremental(table, any_store)
    recreate(table)
    table.append(row("a", 1, 7.0))
    with pytest.raises(RebuildNeeded, match="dropped and created again"):
        incremental(table, any_store)
    table.change_view(on_rebuild_needed="auto")

    report = incremental(table, any_store)

    assert "the table was dropped and created again" in report.reason
    assert (amounts(table, any_store), report.deleted) == ({"a": 7.0}, 1)
    assert position(table, any_store) == (2, 0)


def test_auto_does_not_read_what_no_snapshot_can(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1))
    incremental(table, store)
    table.change_view(on_rebuild_needed="auto", features={"nothing": "int64"})

    with pytest.raises(MaterializeError, match="found no such column"):
        incremental(table, store)


# --- pieces ------------------------------------------------------------------------------------------------------------


def changing(table: Table) -> None:
    """A window of twelve commits that bring, update and delete rows of the same entities."""
    for number in range(8):
        table.append(*(row(f"u{number * 6 + index}", number, float(number)) for index in range(6)))
        table.append(*(row(f"u{index}", number, 10.0 * number) for index in range(0, 48, 5)))


def window(table: Table) -> None:
    table.append(*(row(f"u{index}", 20, 200.0 + index) for index in range(0, 60, 7)))
    table.delta.delete("user_id IN ('u7', 'u14', 'u3')")
    table.append(row("u7", 1, 300.0), row("new", 1, 301.0))
    table.delta.update(updates={"amount": "-1.0"}, predicate="user_id IN ('u21', 'u40', 'new')")
    table.delete_rows(path_in_log(table, 1), [0, 2])
    table.append(row("u40", 30, 302.0))
    table.delta.delete("user_id IN ('u28', 'u49', 'u56')")


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("seed", [1, 2])
def test_pieces_of_a_window_with_removals_in_any_order_and_repeated_end_alike(
    table: Table, store: OnlineStore, pieces: int, seed: int
) -> None:
    changing(table)
    incremental(table, store)
    window(table)
    rng = random.Random(seed)
    order = [*rng.sample(range(pieces), pieces), *rng.choices(range(pieces), k=pieces)]
    assert not plan_of(table, store).snapshot

    report = in_pieces(table, store, pieces, order)

    assert amounts(table, store) == expected_amounts(table)
    assert adds_up(report)
    assert position(table, store) == (1, table.version)
    assert not incremental(table, store).changed


@pytest.mark.parametrize("pieces", [2, 5])
def test_pieces_of_a_snapshot_after_removals_end_alike(table: Table, store: OnlineStore, pieces: int) -> None:
    changing(table)
    incremental(table, store)
    window(table)

    report = in_pieces(table, store, pieces, [*reversed(range(pieces)), *range(pieces)], mode="rebuild")

    assert amounts(table, store) == expected_amounts(table)
    assert adds_up(report)


# --- runs that overlap or die ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["incremental", "rebuild"])
def test_delete_between_the_steps_of_another_run_ends_right(tmp_path: Path, mode: str) -> None:
    for number, order in enumerate(interleavings()):
        table = Table(tmp_path / f"t{number}")
        table.append(row("a", 1, 1.0), row("b", 1, 2.0), row("c", 1, 3.0))
        with MemoryStore() as store:
            incremental(table, store, "before")
            table.append(row("b", 5, 5.0), row("c", 7, 7.0), row("never", 1, 1.0))
            x, y = Stepper(table, store, "incremental", "x"), Stepper(table, store, mode, "y")

            play(order, x, y, {order.index("y"): partial(table.delta.delete, "user_id IN ('b', 'never')")})

            incremental(table, store, "after")
            assert amounts(table, store) == {"a": 1.0, "c": 7.0}, "".join(order)
            errors = [type(run.error) for run in (x, y) if run.error is not None]
            assert set(errors) <= {WatermarkError}, "".join(order)
            assert incremental(table, store, "again").rows_read == 0


@pytest.mark.parametrize("how", ["incremental", "rebuild", "snapshot instead of changes"])
@pytest.mark.parametrize("came", ["before", "after"])
def test_zombie_cannot_bring_an_entity_that_was_never_online_and_is_deleted_by_now(
    table: Table, any_store: OnlineStore, how: str, came: str
) -> None:
    table.append(row("a", 1, 1.0))
    incremental(table, any_store)
    table.append(row("b", 1, 2.0))
    zombie = pipeline.begin(table.view, any_store, plan_of(table, any_store, run_id="zombie"))
    if came == "before":
        assert pipeline.write_piece(table.view, any_store, zombie, 0, now=NOW).written == 1
    table.delta.delete("user_id = 'b'")
    if how.startswith("snapshot"):
        table.append(*(row(None, 1, country=f"{index}{LONG[index:]}") for index in range(20)))  # quarantined
        for amount in ("2.0", "3.0", "4.0", "5.0", "1.0"):
            table.delta.update(updates={"amount": amount})
        assert plan_of(table, any_store).snapshot
    if how == "rebuild":
        pipeline.rebuild(table.view, any_store, run("rebuild"))
    else:
        incremental(table, any_store)

    write_late(table, any_store, zombie)

    assert amounts(table, any_store) == {"a": 1.0}


@pytest.mark.parametrize("crashes", [1, 2])
def test_late_first_run_cannot_bring_what_was_deleted_before_a_later_first_run(
    table: Table, any_store: OnlineStore, crashes: int
) -> None:
    table.append(row("a", 1, 1.0), row("b", 1, 2.0), row("c", 1, 3.0))
    first = pipeline.begin(table.view, any_store, plan_of(table, any_store, run_id="first"))
    table.delta.delete("user_id = 'b'")
    zombies = [first]
    if crashes == 2:
        zombies.append(pipeline.begin(table.view, any_store, plan_of(table, any_store, run_id="second")))
    table.delta.delete("user_id = 'c'")
    plan = plan_of(table, any_store)
    assert (plan.snapshot, plan.fenced) == (True, 0)

    incremental(table, any_store, "last")

    for zombie in zombies:
        write_late(table, any_store, zombie)
    assert amounts(table, any_store) == {"a": 1.0}
    assert incremental(table, any_store).rows_read == 0


def test_late_run_cannot_bring_what_a_snapshot_run_after_a_crashed_one_lacks(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0))
    incremental(table, store)
    table.append(row("b", 1, 2.0), row("c", 1, 3.0))
    zombie = pipeline.begin(table.view, store, plan_of(table, store, run_id="zombie"))
    table.delta.delete("user_id = 'b'")
    crashed = pipeline.begin(table.view, store, plan_of(table, store, "rebuild", run_id="crashed"))
    found = watermark.read(store, "spending")
    assert found is not None
    assert (found.version, found.fenced, crashed.fenced) == (None, 0, 0)
    table.delta.delete("user_id = 'c'")

    incremental(table, store)

    write_late(table, store, zombie)
    write_late(table, store, crashed)
    assert amounts(table, store) == {"a": 1.0}


def test_fence_needs_no_file_that_is_vacuumed(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0), row("b", 1, 2.0))
    incremental(table, store)
    table.delta.delete("user_id = 'b'")
    vacuum(table)

    report = pipeline.rebuild(table.view, store, run())

    assert (report.deleted, amounts(table, store)) == (1, {"a": 1.0})


def test_tombstones_of_a_run_carry_its_version_and_floor(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1), row("b", 1), row("c", 1))
    incremental(table, store)
    table.delta.delete("user_id = 'b'")
    table.delta.update(updates={"amount": "9.0"}, predicate="user_id = 'c'")
    incremental(table, store)

    heads = {key: Header.unpack(record) for key, record in records(table.view, store).items()}

    assert heads[b"b"].tombstone
    assert {key: (head.version, head.floor) for key, head in heads.items()} == {
        b"a": (stamp(1, 0), stamp(1, 0)),
        b"b": (stamp(1, 2), stamp(1, 2)),
        b"c": (stamp(1, 2), stamp(1, 2)),
    }


@pytest.mark.parametrize("effect", [False, True], ids=["lost", "done"])
def test_run_with_removals_that_dies_at_any_write_and_runs_again_ends_right(tmp_path: Path, *, effect: bool) -> None:
    table = Table(tmp_path / "t")
    changing(table)
    begun = MemoryStore()
    incremental(table, begun, "before")
    window(table)
    expected: Any = expected_amounts(table)
    for after in range(1, 50):
        with MemoryStore() as store:
            store.content.records |= begun.content.records
            store.content.cells |= begun.content.cells
            store.content.due |= begun.content.due
            try:
                incremental(table, CrashingStore(store, after=after, effect=effect, error=OnlineStoreError), "dies")
            except OnlineStoreError:
                incremental(table, store, "again")
                assert amounts(table, store) == expected, f"died at write {after}"
            else:
                assert amounts(table, store) == expected
                assert after > 3
                break
    else:
        pytest.fail("the run never came to its end")


def test_what_readers_see_while_a_run_is_under_way_is_old_or_new(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0), row("b", 1, 2.0))
    incremental(table, store)
    table.delta.update(updates={"amount": "5.0"}, predicate="user_id = 'a'")
    table.delta.delete("user_id = 'b'")
    with pytest.raises(OnlineStoreError):
        incremental(table, CrashingStore(store, after=2, effect=False, error=OnlineStoreError))

    assert amounts(table, store) in ({"a": 1.0, "b": 2.0}, {"a": 5.0, "b": 2.0}, {"a": 5.0})
    assert served(table.view, store)["a"]["country"] == "DE"
