"""Column mapping: columns are stored under other names than readers know, may be renamed, dropped and added again."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from materialize.errors import OfflineStoreError
from materialize.model import Interval, to_us
from materialize.offline import open_table
from tests.offline import (
    added,
    changed,
    fields_of,
    map_columns,
    metadata,
    needs_rebuild,
    removal,
    rename_column,
    snapshot,
    stored,
    users,
    with_fields,
)
from tests.tables import SCHEMA, Table, at, row


@pytest.mark.parametrize("mode", ["name", "id"])
@pytest.mark.parametrize("partition_by", [(), ("country",), ("user_id",), ("event_timestamp",)])
def test_columns_that_are_stored_under_other_names_are_read(
    table: Table, mode: str, partition_by: tuple[str, ...]
) -> None:
    map_columns(table, mode, partition_by=partition_by)
    texts = {"country": "F R", "user_id": "a", "event_timestamp": "2095-01-01 00:01:00"}
    partition = {name: texts[name] for name in partition_by}
    table.commit(stored(table, "f.parquet", row("a", 1, 2.5, count=7, country="F R"), partition=partition))

    for rows in (snapshot(table), added(table, 0)):
        (only,) = rows
        assert (only["user_id"], only["event_us"], only["created_us"]) == ("a", to_us(at(1)), to_us(at(1)))
        assert (only["amount"], only["count"], only["country"]) == (2.5, 7, "F R")


def test_statistics_under_a_column_mapping_choose_the_files_of_an_interval(table: Table) -> None:
    map_columns(table)
    for hour in range(3):
        action = stored(table, f"{hour}.parquet", row(f"u{hour}", 60 * hour))
        moment = at(60 * hour).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        limits = {"minValues": {"col-2": moment}, "maxValues": {"col-2": moment}, "nullCount": {"col-2": 0}}
        action["add"]["stats"] = json.dumps({"numRecords": 1, **limits})
        table.commit(action)

    files = open_table(table.view).snapshot_files(Interval(at(30), at(90)))

    assert [file.path for file in files] == ["1.parquet"]


def test_rewritten_and_deleted_rows_under_a_column_mapping_are_told(table: Table) -> None:
    map_columns(table, partition_by=("country",))
    first = stored(table, "f.parquet", *(row(user, 1, 1.0) for user in "abc"), partition={"country": "FR"})
    table.commit(first)
    second = stored(table, "g.parquet", row("a", 1, 1.0), row("b", 1, 2.0), partition={"country": "FR"})
    table.commit(removal(first), second)

    assert changed(table, 1) == ([("b", 2.0)], ["b", "c"])


def test_renamed_column_is_read_under_its_new_name_if_the_view_follows(table: Table) -> None:
    map_columns(table)
    table.commit(stored(table, "f.parquet", row("a", 1, 2.5)))
    rename_column(table, "amount", "spent")

    with pytest.raises(OfflineStoreError, match="feature 'amount': found no such column"):
        open_table(table.view)
    table.change_view(features={"spent": "float64"})
    assert [one["spent"] for one in snapshot(table)] == [2.5]
    assert [one["spent"] for one in added(table, 0)] == [2.5]


def test_renamed_column_that_the_view_does_not_read_changes_nothing(table: Table) -> None:
    map_columns(table)
    table.commit(stored(table, "f.parquet", row("a", 1, 2.5)))
    table.change_view(features={"amount": "float64"})
    rename_column(table, "count", "number")

    assert added(table, 1) == []
    assert [one["amount"] for one in snapshot(table)] == [2.5]


def test_column_that_was_dropped_and_added_again_needs_a_rebuild(table: Table) -> None:
    map_columns(table)
    table.commit(stored(table, "f.parquet", row("a", 1, 2.5)))
    meta = metadata(table)
    others = [field for field in fields_of(meta) if field["name"] != "amount"]
    (old,) = (field for field in fields_of(meta) if field["name"] == "amount")
    table.commit(with_fields(meta, others))
    new = {"delta.columnMapping.id": 7, "delta.columnMapping.physicalName": "col-7"}
    table.commit(with_fields(meta, [*others, old | {"metadata": new}]))

    needs_rebuild(table, 1, r"column 'amount' is another one since version 1 \(was dropped or renamed\)")
    assert added(table, 3) == []
    assert [one["amount"] for one in snapshot(table)] == [None]


def test_columns_that_changed_names_with_each_other_need_a_rebuild(table: Table) -> None:
    table.schema = pa.schema([*SCHEMA, ("tax", pa.float64())])
    map_columns(table)
    table.commit(stored(table, "f.parquet", row("a", 1, 2.5, tax=1.0)))
    rename_column(table, "amount", "other")
    rename_column(table, "tax", "amount")

    needs_rebuild(table, 1, "column 'amount' is another one since version 1")
    assert [one["amount"] for one in snapshot(table)] == [1.0]


def test_mapping_switched_on_in_the_window_changes_nothing(table: Table) -> None:
    table.append(row("a", 1, 2.5))
    meta = metadata(table)
    fields = [
        field | {"metadata": {"delta.columnMapping.id": at, "delta.columnMapping.physicalName": field["name"]}}
        for at, field in enumerate(fields_of(meta), start=1)
    ]
    named = with_fields(meta, fields)
    named["metaData"]["configuration"] = {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "6"}
    table.commit({"protocol": {"minReaderVersion": 2, "minWriterVersion": 5}}, named)
    table.commit(stored(table, "f.parquet", row("b", 1, 3.5)))

    assert changed(table, 0) == ([("b", 3.5)], [])
    assert users(snapshot(table)) == ["a", "b"]


def test_mapping_by_id_with_files_that_have_other_names_is_refused(table: Table) -> None:
    map_columns(table, "id")
    table.commit(stored(table, "f.parquet", row("a", 1, 2.5)))
    rows = pq.read_table(table.path / "f.parquet")
    names = ["renamed" if name == "col-4" else name for name in rows.column_names]
    pq.write_table(rows.rename_columns(names), table.path / "f.parquet")

    with pytest.raises(OfflineStoreError, match="found the column 'renamed' with field id 4"):
        snapshot(table)
