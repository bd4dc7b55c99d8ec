"""What a table must look like: column mapping and times without a zone are read exactly, what cannot be is refused."""

from __future__ import annotations

import itertools
import json
from datetime import timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from materialize.errors import OfflineStoreError
from materialize.model import Interval, to_us
from materialize.offline import changes_since, open_table
from materialize.offline.schema import Column, same_values
from tests.offline import (
    NAIVE,
    added,
    changed,
    difference,
    fields_of,
    metadata,
    naive,
    needs_rebuild,
    path_in_log,
    removal,
    snapshot,
    two_commits,
    users,
    watermark,
    with_fields,
)
from tests.tables import SCHEMA, Table, at, row

if TYPE_CHECKING:
    from pathlib import Path


# --- what is refused -------------------------------------------------------------------------------------------------


def test_every_missing_and_wrong_column_is_told_at_once(table: Table) -> None:
    table.append(row("a", 1))
    table.change_view(
        join_keys=("user_id", "amount", "nobody"),
        event_timestamp="country",
        created_timestamp="never",
        features={"count": "float64", "amount": "string", "nothing": "int64", "country": "string"},
    )

    with pytest.raises(OfflineStoreError) as caught:
        open_table(table.view)

    message = str(caught.value)
    assert "7 problems at version 0" in message
    for name in ("amount", "nobody", "country", "never", "count", "nothing"):
        assert f"'{name}'" in message
    assert "expected timestamp" in message
    assert "found a column of type double, expected string" in message


@pytest.mark.parametrize("name", ["position", "version", "event_us", "created_us", "__path", "__position"])
def test_columns_named_like_our_own_are_read_or_refused_clearly(tmp_path: Path, name: str) -> None:
    renamed = pa.schema([field.with_name(name) if field.name == "event_timestamp" else field for field in SCHEMA])
    table = Table(tmp_path / "t", schema=pa.schema([*renamed, ("key", pa.int64())]))
    table.change_view(event_timestamp=name, join_keys=("key",), features={"amount": "float64", name: "timestamp"})
    table.append({"key": 1, name: at(1), "created": at(1), "amount": 2.0})

    try:
        (only,) = snapshot(table)
    except OfflineStoreError as error:
        assert name in str(error)  # noqa: PT017 - either is right
    else:
        assert only["amount"] == 2.0


@pytest.mark.parametrize("name", ["position", "version", "event_us", "created_us", "__path", "__position"])
def test_join_key_named_like_our_own_column_is_refused(tmp_path: Path, name: str) -> None:
    table = Table(tmp_path / "t", schema=pa.schema([*SCHEMA, (name, pa.int64())]))
    table.append(row("a", 1, **{name: 7}))
    table.change_view(join_keys=("user_id", name))

    with pytest.raises(OfflineStoreError, match=f"join key '{name}'"):
        open_table(table.view)


def test_unknown_reader_feature_is_refused(table: Table) -> None:
    table.create()
    listed = {"readerFeatures": ["futureThing"], "writerFeatures": ["futureThing"]}
    table.commit({"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **listed}})

    with pytest.raises(OfflineStoreError, match="futureThing"):
        open_table(table.view)


@pytest.mark.parametrize("content", ["nothing", "folder", "file", "empty log", "broken commit"])
def test_what_is_no_table_is_told(table: Table, content: str) -> None:
    if content == "folder":
        table.path.mkdir()
    if content == "file":
        table.path.write_text("no table")
    if content in {"empty log", "broken commit"}:
        (table.path / "_delta_log").mkdir(parents=True)
    if content == "broken commit":
        table.log_file(0).write_text("{ this is no json\n")

    with pytest.raises(OfflineStoreError, match="feature view 'spending'") as caught:
        open_table(table.view)

    assert str(table.path) in str(caught.value)
    assert "Nothing was written" in str(caught.value)


def test_broken_commit_in_the_window_is_told(table: Table) -> None:
    two_commits(table)
    opened, before = open_table(table.view), watermark(table, 0)
    table.log_file(1).write_text('{"add": {"path": \n')

    with pytest.raises(OfflineStoreError, match="spending"):
        changes_since(opened, before)


def test_broken_data_file_is_told(table: Table) -> None:
    two_commits(table)
    (table.path / path_in_log(table, 0)).write_bytes(b"PAR1 this is no parquet file PAR1")

    with pytest.raises(OfflineStoreError, match="could not read Delta table"):
        snapshot(table)


def test_data_file_that_is_lost_is_told(table: Table) -> None:
    two_commits(table)
    (table.path / path_in_log(table, 1)).unlink()

    with pytest.raises(OfflineStoreError, match=r"could not read Delta table .* Nothing was written"):
        snapshot(table)


# --- times without a zone --------------------------------------------------------------------------------------------


def test_times_without_a_zone_are_refused_until_the_view_says_what_they_are(tmp_path: Path) -> None:
    table = Table(tmp_path / "t", schema=NAIVE)
    table.create()

    with pytest.raises(OfflineStoreError, match="2 problems at version 0") as caught:
        open_table(table.view)

    for what in ("event_timestamp 'event_timestamp'", "created_timestamp 'created'"):
        assert f"{what}: found a column of type timestamp_ntz (without a time zone; if it is UTC, say" in str(
            caught.value
        )


def test_feature_of_times_without_a_zone_is_refused_and_an_unused_one_is_not(tmp_path: Path) -> None:
    table = Table(tmp_path / "t", schema=pa.schema([*SCHEMA, ("naive", pa.timestamp("us"))]))
    table.append(row("a", 1, naive=None))

    assert users(snapshot(table)) == ["a"]
    with pytest.raises(OfflineStoreError, match="feature 'naive': found a column of type timestamp_ntz"):
        open_table(table.change_view(features={"naive": "timestamp"}))


@pytest.mark.parametrize(
    "partition_by", [[], ["event_timestamp"], ["created"], ["seen"], ["created", "seen", "user_id"]]
)
def test_times_without_a_zone_are_read_as_utc_if_the_view_says_so(tmp_path: Path, partition_by: list[str]) -> None:
    table = Table(tmp_path / "t", schema=pa.schema([*NAIVE, ("seen", pa.timestamp("us"))]))
    table.create(partition_by=partition_by)
    table.change_view(timestamp_ntz="UTC", features={"seen": "timestamp", "amount": "float64"})
    table.append(naive(row("a", 1.25, 1.0, created=2, seen=at(3.5))))
    table.append(naive(row("b", 600, 2.0, created=601, seen=None)))

    for rows in (snapshot(table), added(table, 0)):
        found = {one["user_id"]: (one["event_us"], one["created_us"], one["seen"]) for one in rows}
        assert found["b"] == (to_us(at(600)), to_us(at(601)), None)
        assert found["a"][:2] == (to_us(at(1.25)), to_us(at(2)))
        assert found["a"][2].replace(tzinfo=timezone.utc) == at(3.5)
    assert "a" in users(snapshot(table, Interval(at(1), at(2))))
    assert "b" not in users(snapshot(table, Interval(at(1), at(2))))


def test_rows_without_a_zone_are_compared_when_a_file_is_rewritten(tmp_path: Path) -> None:
    table = Table(tmp_path / "t", schema=pa.schema([*NAIVE, ("seen", pa.timestamp("us"))]))
    table.change_view(timestamp_ntz="UTC", features={"seen": "timestamp", "amount": "float64"})
    table.append(*(naive(row(user, 1, seen=at(5))) for user in "abc"))
    table.delta.update(updates={"seen": "to_timestamp('2095-01-02T00:00:00')"}, predicate="user_id = 'b'")

    rows, lost = difference(table, 0)

    assert ([one["user_id"] for one in rows], lost) == (["b"], ["b"])


# --- columns that change ---------------------------------------------------------------------------------------------


KINDS = ["byte", "short", "integer", "long", "float", "double", "string", "date", "timestamp", "timestamp_ntz"]
KINDS += ["decimal(9,2)", "decimal(12,2)", "decimal(12,3)", "array<float>", "array<double>"]
WIDER = {
    *itertools.combinations(("byte", "short", "integer", "long"), 2),
    ("float", "double"),
    ("decimal(9,2)", "decimal(12,2)"),
}


def test_only_a_wider_type_reads_the_same_values() -> None:
    pairs = list(itertools.product(KINDS, KINDS))

    same = {(before, now) for before, now in pairs if same_values(Column(before, "x"), Column(now, "x"))}

    assert same == WIDER | {(kind, kind) for kind in KINDS}
    assert not any(same_values(Column(before, "x"), Column(now, "y")) for before, now in pairs)


def retyped(table: Table, name: str, kind: str) -> dict[str, Any]:
    """A metaData action by which a column has another type."""
    meta = metadata(table)
    return with_fields(meta, [f | {"type": kind} if f["name"] == name else f for f in fields_of(meta)])


WIDENED = {"readerFeatures": ["typeWidening"], "writerFeatures": ["typeWidening"]}


@pytest.mark.parametrize(
    ("before", "now", "kind", "small", "large"),
    [
        (pa.int32(), pa.int64(), ("long", "int64"), -5, 2**40),
        (pa.int8(), pa.int16(), ("short", "int16"), -5, 300),
        (pa.float32(), pa.float64(), ("double", "float64"), 1.5, 0.1),
        (pa.decimal128(9, 2), pa.decimal128(20, 2), ("decimal(20,2)",) * 2, Decimal("-1.50"), Decimal("12345678.50")),
    ],
)
def test_widened_column_is_read_exactly(
    tmp_path: Path, before: pa.DataType, now: pa.DataType, kind: tuple[str, str], small: Any, large: Any
) -> None:
    table = Table(tmp_path / "t", schema=pa.schema([*SCHEMA, ("x", before)]))
    table.append(row("a", 1, x=small), row("b", 1, x=small))
    table.append(row("c", 1, x=small))
    table.change_view(features={"x": kind[1]})
    protocol = {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **WIDENED}}
    table.commit(protocol, retyped(table, "x", kind[0]))
    table.schema = pa.schema([*SCHEMA, ("x", now)])
    first = {"add": next(action["add"] for action in table.actions(0) if "add" in action)}
    rows = table.arrow([row("b", 1, x=small), row("d", 1, x=large)])
    table.commit(removal(first), table.add_file("g.parquet", rows))

    found, lost = difference(table, 0)

    assert {one["user_id"]: one["x"] for one in found} == {"c": small, "d": large}
    assert lost == ["a"]
    assert {one["user_id"]: one["x"] for one in snapshot(table)} == {"b": small, "c": small, "d": large}


def test_deletion_vectors_of_a_table_with_widened_columns_are_read(tmp_path: Path) -> None:
    schema = pa.schema([field.with_type(pa.int32()) if field.name == "count" else field for field in SCHEMA])
    table = Table(tmp_path / "t", schema=schema)
    table.append(row("a", 1), row("b", 1), row("c", 1))
    listed = ["typeWidening", "deletionVectors"]
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": listed, "writerFeatures": listed}
    table.commit({"protocol": protocol}, retyped(table, "count", "long"))
    table.delete_rows(path_in_log(table, 0), [1])

    assert users(snapshot(table)) == ["a", "c"]
    assert changed(table, 0) == ([], ["b"])
    table.delta.create_checkpoint()
    table.log_file(0).unlink()
    with pytest.raises(OfflineStoreError, match="type widening and deletion vectors together, and commit 0 gone"):
        snapshot(table)


def test_column_that_was_overwritten_with_a_wider_type_is_exact(tmp_path: Path) -> None:
    narrow = pa.schema([field.with_type(pa.int32()) if field.name == "count" else field for field in SCHEMA])
    table = Table(tmp_path / "t", schema=narrow)
    table.append(row("a", 1, count=5), row("b", 1, count=6))
    table.schema = SCHEMA
    table.append(row("a", 1, count=5), row("b", 1, count=7), mode="overwrite", schema_mode="overwrite")

    rows, lost = difference(table, 0)

    assert ([(one["user_id"], one["count"]) for one in rows], lost) == ([("b", 7)], ["b"])


def test_column_that_was_overwritten_with_another_type_needs_a_rebuild(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    table.append(row("a", 1, count=5))
    table.schema = pa.schema([field.with_type(pa.string()) if field.name == "count" else field for field in SCHEMA])
    table.append(row("a", 1, count="5"), mode="overwrite", schema_mode="overwrite")
    table.change_view(features={"count": "string"})

    needs_rebuild(table, 0, r"column 'count' is another one since version 0 \(was long, is string\)")
    assert [one["count"] for one in snapshot(table)] == ["5"]


def test_column_that_had_another_type_for_a_while_needs_a_rebuild(table: Table) -> None:
    table.append(row("a", 1, count=5))
    text = pa.schema([field.with_type(pa.string()) if field.name == "count" else field for field in SCHEMA])
    for schema, count in ((text, "5"), (SCHEMA, 5)):
        table.schema = schema
        table.append(row("a", 1, count=count), mode="overwrite", schema_mode="overwrite")

    needs_rebuild(table, 0, r"column 'count' is another one since version 1 \(was string, is long\)")


def test_other_type_of_a_column_that_the_view_does_not_read_changes_nothing(table: Table) -> None:
    table.append(row("a", 1, 1.0, count=5))
    table.schema = pa.schema([field.with_type(pa.string()) if field.name == "count" else field for field in SCHEMA])
    table.append(row("a", 1, 1.0, count="5"), row("b", 1, 2.0, count="6"), mode="overwrite", schema_mode="overwrite")
    table.change_view(features={"amount": "float64"})

    assert changed(table, 0) == ([("b", 2.0)], [])


def test_changed_partition_columns_need_a_rebuild(table: Table) -> None:
    table.append(row("a", 1, country="FR"))
    table.append(row("b", 1), mode="overwrite", schema_mode="overwrite", partition_by=["country"])
    if not any("metaData" in action for action in table.actions(1)):
        meta = metadata(table)
        meta["metaData"]["partitionColumns"] = ["country"]
        table.log_file(1).write_text("".join(json.dumps(each) + "\n" for each in (meta, *table.actions(1))))

    needs_rebuild(table, 0, "the partition columns changed since version 0")


def test_other_properties_of_the_table_change_nothing(table: Table) -> None:
    table.append(row("a", 1))
    table.delta.alter.set_table_properties({"delta.logRetentionDuration": "interval 60 days"})
    table.append(row("b", 1))

    assert users(added(table, 0)) == ["b"]
