"""What commits did to a table: exactly the rows that they brought, and exactly the entities that lost one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pytest

from materialize.model import to_us
from materialize.offline import changes_since, open_table
from tests.offline import (
    added,
    changed,
    difference,
    removal,
    snapshot,
    two_commits,
    users,
    vacuum,
    watermark,
)
from tests.tables import SCHEMA, Table, at, row

if TYPE_CHECKING:
    from pathlib import Path


# --- rows that are only added ----------------------------------------------------------------------------------------


def test_append_is_read_with_its_own_commit_and_older_commits_are_not(table: Table) -> None:
    table.append(row("a", 1))
    table.append(row("b", 2))
    table.append(row("c", 3), row("d", 4))

    assert {one["user_id"]: one["version"] for one in added(table, 0)} == {"b": 1, "c": 2, "d": 2}
    assert added(table, 2) == []


def test_late_append_is_read_however_old_its_event_time(table: Table) -> None:
    table.append(row("a", 1_000))
    table.append(row("b", -500_000))

    assert [one["event_us"] for one in added(table, 0)] == [to_us(at(-500_000))]


def test_optimize_in_the_window_costs_nothing_and_rows_keep_their_commits(table: Table) -> None:
    for minute in range(4):
        table.append(row(f"u{minute}", minute))
    before = added(table, 0)
    assert table.delta.optimize.compact()["numFilesRemoved"] == 4

    opened = open_table(table.view)
    changes = changes_since(opened, watermark(table, 0))

    assert [(change.version, change.removes, len(change.adds)) for change in changes] == [(n, (), 1) for n in (1, 2, 3)]
    assert added(table, 0) == before


def test_only_optimize_in_the_window_brings_nothing(table: Table) -> None:
    table.append(row("a", 1))
    last = table.append(row("b", 2))
    table.delta.optimize.compact()

    assert added(table, last) == []


def test_z_order_in_the_window_brings_nothing(table: Table) -> None:
    table.append(row("a", 1), row("b", 2))
    last = table.append(row("c", 2), row("d", 2))
    assert table.delta.optimize.z_order(["amount"])["numFilesRemoved"] == 2

    assert added(table, last) == []
    assert users(added(table, 0)) == ["c", "d"]
    assert users(snapshot(table)) == ["a", "b", "c", "d"]


def test_vacuum_of_files_from_before_the_watermark_costs_nothing(table: Table) -> None:
    two_commits(table)
    table.delta.optimize.compact()
    table.delta.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)
    last = table.version
    table.append(row("d", 4))

    assert users(added(table, 1)) == users(added(table, last)) == ["d"]


def test_added_column_is_read_and_null_where_a_commit_did_not_have_it(table: Table) -> None:
    two_commits(table)
    table.append(row("d", 4, 1.0))
    table.schema = pa.schema([*SCHEMA, ("score", pa.float64())])
    table.append(row("e", 5, 2.0, score=0.5), schema_mode="merge")
    table.change_view(features={"score": "float64", "amount": "float64"})
    table.delta.update(updates={"score": "0.25"}, predicate="user_id = 'd'")

    rows, lost = difference(table, 1)

    assert sorted((one["user_id"], one["score"], one["version"]) for one in rows if one["user_id"] == "e") == [
        ("e", 0.5, 3)
    ]
    assert [(one["score"], one["version"]) for one in rows if one["user_id"] == "d"] == [(None, 2), (0.25, 4)]
    assert lost == ["d"]


def test_same_file_added_again_with_other_statistics_is_no_change(table: Table) -> None:
    table.append(row("a", 1))
    again = {"add": next(action["add"] for action in table.actions(0) if "add" in action)}
    table.commit(removal(again), {"add": again["add"] | {"stats": '{"numRecords": 1}', "tags": {"seen": "yes"}}})

    assert added(table, 0) == []
    assert changes_since(open_table(table.view), watermark(table, 0)) == []


def test_file_that_is_only_added_again_keeps_its_rows_and_counts_for_the_later_commit(table: Table) -> None:
    table.append(row("a", 1))
    table.commit(next(action for action in table.actions(0) if "add" in action))

    assert [(one["user_id"], one["version"]) for one in added(table, 0)] == [("a", 1)]
    assert users(snapshot(table)) == ["a"]


def test_merge_that_only_inserts_is_read(table: Table) -> None:
    two_commits(table)
    merging = table.delta.merge(
        table.arrow([row("y", 5), row("z", 5)]), "s.user_id = t.user_id", source_alias="s", target_alias="t"
    )
    merging.when_not_matched_insert_all().execute()

    assert users(added(table, 1)) == ["y", "z"]


# --- rows that go ----------------------------------------------------------------------------------------------------


def test_delete_tells_the_entities_that_lost_a_row(table: Table) -> None:
    two_commits(table)
    table.delta.delete("user_id = 'a'")

    assert changed(table, 1) == ([], ["a"])
    assert users(snapshot(table)) == ["b", "c"]


def test_delete_of_a_row_that_came_in_the_window_tells_both(table: Table) -> None:
    two_commits(table)
    table.delta.delete("user_id = 'c'")

    assert changed(table, 0) == ([("c", 0.0)], ["c"])
    assert users(snapshot(table)) == ["a", "b"]


def test_update_of_one_row_of_a_large_file_is_one_row_and_one_entity(table: Table) -> None:
    table.append(*(row(f"u{index:04}", index % 7, float(index)) for index in range(1_000)))
    table.delta.update(updates={"amount": "-1.0"}, predicate="user_id = 'u0500'")
    assert any("remove" in action for action in table.actions(1))

    rows, lost = difference(table, 0)

    assert [(one["user_id"], one["amount"], one["version"]) for one in rows] == [("u0500", -1.0, 1)]
    assert lost == ["u0500"]


def test_update_that_changes_nothing_is_no_change(table: Table) -> None:
    two_commits(table)
    table.delta.update(updates={"amount": "amount"}, predicate="user_id = 'a'")

    assert changed(table, 1) == ([], [])


def test_update_of_a_column_that_the_view_does_not_read_is_no_change(table: Table) -> None:
    two_commits(table)
    table.change_view(features={"amount": "float64"})
    table.delta.update(updates={"country": "'FR'"})

    assert changed(table, 1) == ([], [])


@pytest.mark.parametrize("column", ["event_timestamp", "created"])
def test_update_of_a_time_is_another_row(table: Table, column: str) -> None:
    two_commits(table)
    table.delta.update(updates={column: "to_timestamp('2095-01-03T00:00:00Z')"}, predicate="user_id = 'a'")

    rows, lost = difference(table, 1)

    moment = "event_us" if column == "event_timestamp" else "created_us"
    assert [(one["user_id"], one[moment]) for one in rows] == [("a", to_us(at(2 * 24 * 60)))]
    assert lost == ["a"]


def test_update_of_a_join_key_takes_the_row_from_one_entity_to_another(table: Table) -> None:
    two_commits(table)
    table.delta.update(updates={"user_id": "'z'"}, predicate="user_id = 'a'")

    assert changed(table, 1) == ([("z", 0.0)], ["a"])


def test_merge_tells_what_it_inserted_updated_and_deleted(table: Table) -> None:
    two_commits(table)
    source = table.arrow([row("a", 5, 1.0), row("b", 5, -1.0), row("z", 5, 2.0)])
    merging = table.delta.merge(source, "s.user_id = t.user_id", source_alias="s", target_alias="t")
    deleting = merging.when_matched_delete("s.amount < 0").when_matched_update_all()
    deleting.when_not_matched_insert_all().execute()

    assert changed(table, 1) == ([("a", 1.0), ("z", 2.0)], ["a", "b"])
    assert users(snapshot(table)) == ["a", "c", "z"]


def test_overwrite_tells_only_what_is_other_than_before(table: Table) -> None:
    two_commits(table)
    table.append(row("c", 3), row("a", 1, 7.0), row("z", 9), mode="overwrite")

    assert changed(table, 1) == ([("a", 7.0), ("z", 0.0)], ["a", "b"])


def test_overwrite_of_one_partition_tells_only_that_one(table: Table) -> None:
    table.create(partition_by=["country"])
    table.append(row("a", 1, country="FR"), row("b", 1, country="GB"), row("c", 1, country="FR"))
    table.append(row("a", 1, 7.0, country="FR"), mode="overwrite", predicate="country = 'FR'")

    assert changed(table, 1) == ([("a", 7.0)], ["a", "c"])


def test_row_that_moves_to_another_partition_is_another_row_of_its_entity(table: Table) -> None:
    table.create(partition_by=["country"])
    table.append(row("a", 1, 1.0, country="FR"), row("b", 1, 2.0, country="FR"))
    table.delta.update(updates={"country": "'GB'"}, predicate="user_id = 'a'")

    rows, lost = difference(table, 1)

    assert ([(one["user_id"], one["country"]) for one in rows], lost) == ([("a", "GB")], ["a"])


def test_restore_tells_what_went(table: Table) -> None:
    two_commits(table)
    table.delta.restore(0)

    assert changed(table, 1) == ([], ["c"])
    assert users(snapshot(table)) == ["a", "b"]


def test_restore_that_only_brings_rows_back_is_read_as_added(table: Table) -> None:
    two_commits(table)
    table.delta.delete()
    table.delta.restore(1)

    assert users(added(table, 2)) == users(snapshot(table)) == ["a", "b", "c"]
    assert {one["version"] for one in added(table, 2)} == {3}


def test_rows_that_were_deleted_and_restored_in_the_window_are_lost_and_added(table: Table) -> None:
    two_commits(table)
    table.delta.delete("user_id = 'a'")
    table.delta.restore(1)

    assert changed(table, 1) == ([("a", 0.0)], ["a"])
    assert users(snapshot(table)) == ["a", "b", "c"]


def test_whole_files_that_were_deleted_and_restored_in_the_window_are_lost_and_added(table: Table) -> None:
    two_commits(table)
    table.delta.delete()
    table.delta.restore(1)

    rows, lost = difference(table, 0)

    assert (users(rows), lost) == (["a", "b", "c"], ["a", "b", "c"])
    assert {one["version"] for one in rows} == {3}


def test_entity_whose_row_came_and_went_in_the_window_is_lost(table: Table) -> None:
    two_commits(table)
    table.append(row("a", 9, 9.0), row("new", 9, 9.0))
    table.delta.delete("amount = 9.0")

    assert changed(table, 1) == ([("a", 9.0), ("new", 9.0)], ["a", "new"])
    assert changed(table, 2) == ([], ["a", "new"])


def test_optimize_after_a_rewrite_is_no_other_change(table: Table) -> None:
    two_commits(table)
    table.append(row("d", 4))
    table.delta.delete("user_id = 'a'")
    before = changed(table, 1)
    table.delta.optimize.compact()

    assert changed(table, 1) == before == ([("d", 0.0)], ["a"])


def test_several_rewrites_are_told_one_after_the_other(table: Table) -> None:
    table.append(row("a", 1, 1.0), row("b", 1, 1.0))
    for amount in ("2.0", "3.0", "1.0"):
        table.delta.update(updates={"amount": amount}, predicate="user_id = 'a'")

    rows, lost = difference(table, 0)

    assert sorted((one["version"], one["amount"]) for one in rows) == [(1, 2.0), (2, 3.0), (3, 1.0)]
    assert lost == ["a"]


def test_removes_without_partition_values_are_exact_if_the_table_has_no_partitions(table: Table) -> None:
    two_commits(table)
    action = {"add": next(action["add"] for action in table.actions(0) if "add" in action)}
    table.commit(removal(action, partitionValues=None))

    assert changed(table, 1) == ([], ["a", "b"])


def test_removed_file_that_is_removed_without_data_change_is_no_change(table: Table) -> None:
    two_commits(table)
    action = {"add": next(action["add"] for action in table.actions(0) if "add" in action)}
    moved = table.add_file("moved.parquet", table.arrow([row("a", 1), row("b", 2)]))
    moved["add"]["dataChange"] = False
    table.commit(removal(action, dataChange=False), moved)
    vacuum(table)

    assert changed(table, 1) == ([], [])


def test_files_outside_of_the_table_are_compared(table: Table, tmp_path: Path) -> None:
    table.create()
    actions = []
    for name, rows in {"x": [row("a", 1), row("b", 1)], "y": [row("b", 1), row("c", 1)]}.items():
        action = table.add_file(f"{name}.parquet", table.arrow(rows))
        (table.path / f"{name}.parquet").rename(tmp_path / f"{name}.parquet")
        action["add"]["path"] = f"file:{tmp_path}/{name}.parquet"
        actions.append(action)
    table.commit(actions[0])
    table.commit(removal(actions[0]), actions[1])

    assert changed(table, 1) == ([("c", 0.0)], ["a"])
