"""When what changed cannot be told any more: RebuildNeeded, with the reason, while the snapshot can still be read."""

from __future__ import annotations

import json
import shutil
from uuid import UUID

import pytest
from deltalake import CommitProperties, DeltaTable

from materialize.errors import OfflineStoreError, RebuildNeeded
from materialize.offline import changes_since, open_table, removed_since
from tests.offline import (
    added,
    changed,
    map_columns,
    needs_rebuild,
    path_in_log,
    removal,
    rename_column,
    snapshot,
    stored,
    two_commits,
    users,
    vacuum,
    watermark,
)
from tests.tables import SCHEMA, Table, deletion_vector_file, row

# --- another table or another past -----------------------------------------------------------------------------------


def test_table_dropped_and_recreated_needs_a_rebuild(table: Table) -> None:
    two_commits(table)
    before = watermark(table, 1)
    shutil.rmtree(table.path)
    for minute in range(4):
        table.append(row("z", minute))
    opened = open_table(table.view)

    with pytest.raises(RebuildNeeded) as caught:
        changes_since(opened, before)
    assert caught.value.reason == (
        f"the table was dropped and created again (id {before.table_id}, now {opened.table_id})"
    )


def test_head_behind_the_watermark_needs_a_rebuild(table: Table) -> None:
    two_commits(table)
    table.log_file(1).unlink()

    needs_rebuild(table, 1, "the table's head is version 0, behind the watermark")


# --- commits that are gone -------------------------------------------------------------------------------------------


def test_commit_file_gone_needs_a_rebuild_and_the_snapshot_can_be_read(table: Table) -> None:
    for minute in range(6):
        table.append(row(f"u{minute}", minute))
    table.delta.create_checkpoint()
    for version in range(4):
        table.log_file(version).unlink()

    needs_rebuild(table, 1, r"commit 2 is gone from the log \(the oldest is 4\)")
    assert users(added(table, 3)) == ["u4", "u5"]
    assert users(snapshot(table)) == [f"u{minute}" for minute in range(6)]


def test_log_without_any_commit_file_is_read_from_its_checkpoint(table: Table) -> None:
    two_commits(table)
    table.delta.create_checkpoint()
    for version in range(2):
        table.log_file(version).unlink()

    needs_rebuild(table, 0, "no commit file is left")
    assert users(snapshot(table)) == ["a", "b", "c"]
    assert added(table, 1) == []


def test_log_cleaned_by_the_library_is_read_as_far_as_it_goes(table: Table) -> None:
    DeltaTable.create(str(table.path), schema=SCHEMA, configuration={"delta.logRetentionDuration": "interval 0 days"})
    for minute in range(5):
        table.append(row(f"u{minute}", minute), commit_properties=CommitProperties(custom_metadata={"n": str(minute)}))
    table.delta.create_checkpoint()
    table.delta.cleanup_metadata()

    assert users(snapshot(table)) == [f"u{minute}" for minute in range(5)]
    if not table.log_file(1).exists():
        needs_rebuild(table, 0, "is gone from the log")


def test_metadata_commit_whose_schema_before_is_gone_needs_a_rebuild(table: Table) -> None:
    two_commits(table)
    meta = next(action for action in table.actions(0) if "metaData" in action)
    table.commit(meta)
    table.append(row("d", 4))
    table.delta.create_checkpoint()
    for version in (0, 1):
        table.log_file(version).unlink()

    needs_rebuild(table, 1, "the schema before version 2 cannot be read any more")
    assert users(added(table, 2)) == ["d"]


# --- files that are gone ---------------------------------------------------------------------------------------------


def test_added_compacted_and_vacuumed_file_needs_a_rebuild(table: Table) -> None:
    two_commits(table)
    table.append(row("d", 4))
    table.delta.optimize.compact()
    vacuum(table)

    needs_rebuild(table, 0, "2 data files that were removed since are vacuumed")
    assert users(snapshot(table)) == ["a", "b", "c", "d"]


def test_removed_and_vacuumed_file_needs_a_rebuild(table: Table) -> None:
    two_commits(table)
    table.delta.update(updates={"amount": "9.0"}, predicate="user_id = 'a'")
    assert changed(table, 1) == ([("a", 9.0)], ["a"])
    vacuum(table)

    needs_rebuild(table, 1, "1 data files that were removed since are vacuumed")
    last = table.version
    table.append(row("d", 4))
    assert users(added(table, last)) == ["d"]


def test_vacuumed_deletion_vector_needs_a_rebuild(table: Table) -> None:
    table.append(row("a", 1), row("b", 1))
    name = UUID(int=7)
    path, content, vector = deletion_vector_file(name, [0])
    (table.path / path).write_bytes(content)
    table.delete_rows(path_in_log(table, 0), [0])
    first = next(action["add"] for action in table.actions(1) if "add" in action)
    lines = [{"add": first | {"deletionVector": vector}} if "add" in action else action for action in table.actions(1)]
    table.log_file(1).write_text("".join(json.dumps(line) + "\n" for line in lines))
    table.commit(removal({"add": first | {"deletionVector": vector}}), {"add": first})
    assert changed(table, 0) == ([], ["a"])
    assert changed(table, 1) == ([], [])
    (table.path / path).unlink()

    needs_rebuild(table, 1, "1 data files that were removed since are vacuumed")


def test_removes_without_partition_values_need_a_rebuild_if_the_table_has_partitions(table: Table) -> None:
    table.create(partition_by=["country"])
    table.append(row("a", 1, country="FR"))
    action = {"add": next(action["add"] for action in table.actions(1) if "add" in action)}
    table.commit(removal(action, partitionValues=None))

    needs_rebuild(table, 1, "files were removed without their partition values")
    needs_rebuild(table, 0, "files were removed without their partition values")
    assert snapshot(table) == []


def test_optimize_without_partition_values_costs_nothing(table: Table) -> None:
    table.create(partition_by=["country"])
    last = table.append(row("a", 1, country="FR"))
    action = {"add": next(action["add"] for action in table.actions(1) if "add" in action)}
    moved = table.add_file("moved.parquet", table.arrow([row("a", 1, country="FR")]), partition={"country": "FR"})
    moved["add"]["dataChange"] = False
    table.commit(removal(action, partitionValues=None, dataChange=False), moved)

    assert changed(table, last) == ([], [])


def test_file_that_is_lost_and_not_removed_is_an_error_and_no_rebuild(table: Table) -> None:
    two_commits(table)
    (table.path / path_in_log(table, 1)).unlink()

    with pytest.raises(OfflineStoreError, match="Nothing was written") as caught:
        changed(table, 0)
    assert not isinstance(caught.value, RebuildNeeded)


# --- what a snapshot run still knows of removed files ----------------------------------------------------------------


def removed_paths(table: Table, after: int) -> list[str]:
    return sorted(action["path"] for action in removed_since(open_table(table.view), after))


def test_removed_files_are_told_as_far_as_commits_and_files_are_left(table: Table) -> None:
    for user in "abc":
        table.append(row(user, 1))
    paths = [path_in_log(table, version) for version in range(3)]
    for user in "abc":
        table.delta.delete(f"user_id = '{user}'")
    assert removed_paths(table, 2) == sorted(paths)
    assert removed_paths(table, 4) == [paths[2]]
    assert removed_paths(table, 5) == []

    (table.path / paths[1]).unlink()
    assert removed_paths(table, 2) == sorted([paths[0], paths[2]])
    table.delta.create_checkpoint()
    for version in range(4):
        table.log_file(version).unlink()
    assert removed_paths(table, 2) == [paths[2]]


def test_files_that_were_only_compacted_are_not_told(table: Table) -> None:
    two_commits(table)
    table.delta.optimize.compact()

    assert removed_paths(table, 0) == []


def test_no_removed_file_is_told_if_the_join_key_was_another_one(table: Table) -> None:
    map_columns(table)
    first = stored(table, "f.parquet", row("a", 1))
    table.commit(first)
    table.commit(removal(first))
    assert removed_paths(table, 1) == ["f.parquet"]
    table.change_view(features={"amount": "float64"})
    rename_column(table, "user_id", "old")
    rename_column(table, "country", "user_id")

    assert removed_paths(table, 1) == []


def test_removed_files_without_partition_values_are_not_told_if_the_table_has_partitions(table: Table) -> None:
    table.create(partition_by=["user_id"])
    table.append(row("a", 1))
    action = {"add": next(action["add"] for action in table.actions(1) if "add" in action)}
    table.commit(removal(action, partitionValues=None))

    assert removed_paths(table, 1) == []
