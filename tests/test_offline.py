"""The offline store against real Delta tables: what it reads, and what it refuses to read."""

from __future__ import annotations

import json
import shutil
from datetime import date, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable

from materialize.errors import OfflineStoreError, RebuildNeeded
from materialize.latest import newest
from materialize.model import Interval, Watermark, to_us
from materialize.offline import open_table, planned_files, total_rows
from materialize.order import NO_CREATED
from tests.tables import SCHEMA, T0, UTC_TIME, Table, at, row

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import polars as pl

    from materialize.offline import DataFile, OfflineTable

WIDE = pa.schema([*SCHEMA, ("score", pa.float64())])


def watermark(table: Table, version: int, **changes: Any) -> Watermark:
    values = {
        "generation": 1,
        "table_id": str(table.delta.metadata().id),
        "schema": table.view.schema_text,
        "run_id": "r",
    }
    return Watermark(**(values | {"version": version} | changes))


def rows_of(opened: OfflineTable, files: Sequence[DataFile], order: pl.DataFrame | None = None) -> list[dict[str, Any]]:
    """The rows of *files* (or of *order* alone) as a run reads them: keys and order first, then the features."""
    if not files:
        return []
    found, counts = opened.read_order(files)
    order = found if order is None else order
    rows = order.to_dicts()
    for first, features in opened.read_features(files, counts, order["position"]):
        for index, values in enumerate(features.to_dicts()):
            rows[first + index] |= values
    return rows


def snapshot(table: Table, interval: Interval | None = None) -> list[dict[str, Any]]:
    opened = open_table(table.view)
    return rows_of(opened, planned_files(opened, whole=True, interval=interval, watermark=None))


def added(table: Table, after: int) -> list[dict[str, Any]]:
    opened = open_table(table.view)
    return rows_of(opened, planned_files(opened, whole=False, interval=None, watermark=watermark(table, after)))


def latest(table: Table, after: int | None = None) -> dict[str, dict[str, Any]]:
    """The newest row of each entity, from the snapshot or from what came after a version."""
    opened = open_table(table.view)
    found = None if after is None else watermark(table, after)
    files = planned_files(opened, whole=after is None, interval=None, watermark=found)
    order, _ = opened.read_order(files)
    return {one["user_id"]: one for one in rows_of(opened, files, newest(order, table.view.join_keys))}


def users(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(one["user_id"] for one in rows)


def path_in_log(table: Table, version: int) -> str:
    return next(action["add"]["path"] for action in table.actions(version) if "add" in action)


def needs_rebuild(table: Table, after: int, because: str) -> None:
    with pytest.raises(RebuildNeeded, match=because) as caught:
        added(table, after)
    assert f"the watermark stays at version {after}" in str(caught.value)
    assert f"materialize rebuild {table.view.name}" in str(caught.value)


# --- what commits brought ----------------------------------------------------------------------------------------------


def test_snapshot_reads_every_row_with_its_commit_and_order(table: Table) -> None:
    table.append(row("a", 1, 1.5, created=2), row("b", None, 2.5, created=None))
    table.append(row("c", 3, 3.5, count=None, country=None))

    by_user = {one["user_id"]: one for one in snapshot(table)}

    a, b, c = (by_user[user] for user in "abc")
    assert (a["event_us"], a["created_us"], a["version"]) == (to_us(at(1)), to_us(at(2)), 0)
    assert (b["event_us"], b["created_us"]) == (None, NO_CREATED)
    assert (c["version"], c["amount"], c["count"], c["country"]) == (1, 3.5, None, None)
    assert sorted(one["position"] for one in by_user.values()) == [0, 1, 2]


def test_view_without_created_timestamp_reads_none(table: Table) -> None:
    table.append(row("a", 1, created=5))
    table.change_view(created_timestamp=None)

    assert [one["created_us"] for one in snapshot(table)] == [NO_CREATED]


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
    after = planned_files(opened, whole=False, interval=None, watermark=watermark(table, 0))

    assert len(after) == 3
    assert rows_of(opened, after) == before


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


def test_added_column_is_null_in_older_files(table: Table) -> None:
    table.append(row("a", 1))
    table.schema = WIDE
    table.append(row("b", 2, score=0.5), schema_mode="merge")
    table.change_view(features={"score": "float64", "amount": "float64"})

    assert {one["user_id"]: one["score"] for one in snapshot(table)} == {"a": None, "b": 0.5}
    assert [one["score"] for one in added(table, 0)] == [0.5]


def test_empty_table_has_nothing(table: Table) -> None:
    table.create()

    assert snapshot(table) == []


def test_files_without_rows_are_harmless(table: Table) -> None:
    table.create()
    table.commit(table.add_file("only.parquet", table.arrow([])))
    assert snapshot(table) == []

    table.commit(
        table.add_file("a.parquet", table.arrow([])),
        table.add_file("b.parquet", table.arrow([row("a", 1), row("b", 2)])),
        table.add_file("c.parquet", table.arrow([])),
        table.add_file("d.parquet", table.arrow([row("c", 3)])),
    )

    assert users(snapshot(table)) == users(added(table, 0)) == ["a", "b", "c"]


def test_files_without_statistics_are_read(table: Table) -> None:
    table.create()
    action = table.add_file("a.parquet", table.arrow([row("a", 1), row("b", 2)]))
    del action["add"]["stats"]
    table.commit(action)
    interval = Interval(at(0), at(60))

    assert users(snapshot(table, interval)) == users(added(table, 0)) == ["a", "b"]
    assert total_rows(open_table(table.view).snapshot_files()) > 0


def test_file_of_several_row_groups_is_read_whole_and_in_order(table: Table) -> None:
    table.create()
    rows = [row(f"u{index:03}", index, float(index)) for index in range(250)]
    table.commit(table.add_file("groups.parquet", table.arrow(rows), row_group_size=40))

    assert [(one["user_id"], one["amount"]) for one in snapshot(table)] == [(r["user_id"], r["amount"]) for r in rows]


def test_large_file_between_small_ones_is_read_in_slices_without_losing_a_row(table: Table) -> None:
    large = 30_000
    wide = {f"f{index}": "list<float64,256>" for index in range(4)}
    vectors = pa.array([[float(index)] for index in range(large + 5)], pa.list_(pa.float64()))
    keys = pa.array([f"u{index}" for index in range(large + 5)])
    moments = pa.array([T0] * (large + 5), UTC_TIME)
    data = pa.table({"user_id": keys, "event_timestamp": moments, "created": moments} | dict.fromkeys(wide, vectors))
    table.create(schema=data.schema)
    names = ("a", "b", "c", "d")
    parts = (data.slice(0, 2), data.slice(2, large), data.slice(large + 2, 1), data.slice(large + 3, 2))
    table.commit(
        *(
            table.add_file(f"{name}.parquet", part, row_group_size=7_000)
            for name, part in zip(names, parts, strict=True)
        )
    )
    table.change_view(features=wide)
    opened = open_table(table.view)
    files = opened.snapshot_files()
    order, counts = opened.read_order(files)

    some = order.filter(order["position"] % 3 == 0)
    blocks = list(opened.read_features(files, counts, some["position"]))

    assert counts.tolist() == [2, large, 1, 2]
    assert len(blocks) > 3
    values = [value for first, block in blocks for value in block["f3"].list.first().to_list()]
    assert values == [float(key[1:]) for key in some["user_id"]]
    assert [first for first, _ in blocks] == [sum(b.height for _, b in blocks[:index]) for index in range(len(blocks))]


def test_many_files_are_read_with_the_right_partition_values(table: Table) -> None:
    table.append(*(row(f"u{index}", index, country=f"c{index % 97}") for index in range(500)), partition_by=["country"])

    rows = snapshot(table)

    assert len(open_table(table.view).snapshot_files()) == 97
    assert {one["user_id"]: one["country"] for one in rows} == {f"u{i}": f"c{i % 97}" for i in range(500)}


def test_interval_reads_no_file_outside_of_it_and_every_file_that_may_touch_it(table: Table) -> None:
    for hour in range(5):
        table.append(row(f"u{hour}", 60 * hour), row(f"v{hour}", 60 * hour + 59.999999))
    opened = open_table(table.view)

    files = opened.snapshot_files(Interval(at(120), at(180)))

    assert {"u2", "v2"} <= set(users(rows_of(opened, files)))
    assert len(files) <= 3  # the hour itself, and neighbours whose bounds the log cuts to milliseconds


# --- partition values --------------------------------------------------------------------------------------------------

AWKWARD = [
    "a b",
    "a/b",
    "100%",
    "%20",
    "ü€😀",
    "a=b",
    "x:y",
    "p|q",
    "{z}",
    "C:\\d",
    "?#&",
    "it's",
    'say "x"',
    "tab\t",
    ".",
]


@pytest.mark.parametrize("folder", ["table", "a b", "ü #+&="])
def test_awkward_partition_values_come_from_the_log(tmp_path: Path, folder: str) -> None:
    table = Table(tmp_path / folder)
    table.create(partition_by=["country"])
    rows = [row(f"u{index}", index, country=value) for index, value in enumerate([*AWKWARD, "", None])]
    table.append(*rows)
    expected = {one["user_id"]: one["country"] or None for one in rows}

    assert {one["user_id"]: one["country"] for one in snapshot(table)} == expected
    assert {one["user_id"]: one["country"] for one in added(table, 0)} == expected


def test_random_prefix_layout_reads_partition_values_that_no_path_tells(table: Table) -> None:
    table.create(partition_by=["country"])
    table.commit(
        table.add_file("x7/f1.parquet", table.arrow([row("a", 1)]), partition={"country": "FR"}),
        table.add_file("country=XX/f2.parquet", table.arrow([row("b", 1)]), partition={"country": "GB"}),
        table.add_file("q9/f3.parquet", table.arrow([row("c", 1)]), partition={"country": None}),
        table.add_file("q9/f4.parquet", table.arrow([row("d", 1)]), partition={"country": ""}),
    )
    expected = {"a": "FR", "b": "GB", "c": None, "d": None}

    assert {one["user_id"]: one["country"] for one in snapshot(table)} == expected
    assert {one["user_id"]: one["country"] for one in added(table, 0)} == expected


def test_partition_values_of_every_type_are_typed_alike_on_both_paths(tmp_path: Path) -> None:
    types = {
        "i8": (pa.int8(), [-5, None]),
        "i16": (pa.int16(), [300, None]),
        "i32": (pa.int32(), [-70_000, None]),
        "i64": (pa.int64(), [2**62 + 1, None]),
        "f64": (pa.float64(), [-0.5, None]),
        "f32": (pa.float32(), [1.25, None]),
        "flag": (pa.bool_(), [True, None]),
        "no": (pa.bool_(), [False, None]),
        "day": (pa.date32(), [date(1969, 12, 31), None]),
        "moment": (UTC_TIME, [at(1.5), None]),
        "price": (pa.decimal128(10, 2), [Decimal("12.50"), None]),
    }
    table = Table(tmp_path / "t", schema=pa.schema([*SCHEMA, *((name, kind) for name, (kind, _) in types.items())]))
    table.create(partition_by=list(types))
    table.append(row("a", 1, **{name: values[0] for name, (_, values) in types.items()}))
    table.append(row("b", 1, **{name: values[1] for name, (_, values) in types.items()}))
    kinds = [
        "int8",
        "int16",
        "int32",
        "int64",
        "float64",
        "float32",
        "bool",
        "bool",
        "date",
        "timestamp",
        "decimal(10,2)",
    ]
    table.change_view(features=dict(zip(types, kinds, strict=True)))

    for rows in (snapshot(table), added(table, 0)):
        found = {one["user_id"]: [one[name] for name in types] for one in rows}
        assert found == {"a": [values[0] for _, values in types.values()], "b": [None] * len(types)}


@pytest.mark.parametrize(
    "text",
    ["2095-01-01 00:01:30.5", "2095-01-01 00:01:30.500000", "2095-01-01T00:01:30.500Z", "2095-01-01T00:01:30.50Z"],
)
def test_partition_timestamps_are_read_as_any_writer_leaves_them(tmp_path: Path, text: str) -> None:
    table = Table(tmp_path / "t", schema=pa.schema([*SCHEMA, ("moment", UTC_TIME)]))
    table.create(partition_by=["moment"])
    table.commit(table.add_file("f.parquet", table.arrow([row("a", 1, moment=None)]), partition={"moment": text}))
    table.change_view(features={"moment": "timestamp"})

    assert [one["moment"] for one in added(table, 0)] == [T0 + timedelta(seconds=90.5)]


def test_join_key_and_event_time_may_be_partition_columns(table: Table) -> None:
    table.create(partition_by=["user_id", "event_timestamp"])
    table.append(row("a b", 1, 1.0), row("c/d", 2.5, 2.0))

    for rows in (snapshot(table), added(table, 0)):
        assert {one["user_id"]: (one["event_us"], one["amount"]) for one in rows} == {
            "a b": (to_us(at(1)), 1.0),
            "c/d": (to_us(at(2.5)), 2.0),
        }


def test_features_may_all_be_partition_columns(table: Table) -> None:
    table.create(partition_by=["country"])
    table.append(row("a", 1, country="FR"), row("b", 2, country="GB"))
    table.change_view(features={"country": "string"})

    assert {one["user_id"]: one["country"] for one in snapshot(table)} == {"a": "FR", "b": "GB"}


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


# --- deletion vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["table", "a b ü"])
def test_deletion_vectors_hide_rows_of_a_snapshot(tmp_path: Path, folder: str) -> None:
    table = Table(tmp_path / folder)
    table.create(partition_by=["country"])
    rows = table.arrow([row(f"u{index}", index) for index in range(10)])
    action = table.add_file("country=%25/f.parquet", rows, partition={"country": "%"}, row_group_size=3)
    action["add"]["path"] = "country=%2525/f.parquet"
    table.commit(action)
    table.append(*(row(f"v{index}", index, country="a b") for index in range(3)))

    table.delete_rows("country=%2525/f.parquet", [0, 4, 9])
    table.delete_rows(path_in_log(table, 2), [1])

    assert users(snapshot(table)) == ["u1", "u2", "u3", "u5", "u6", "u7", "u8", "v0", "v2"]


def test_deletion_vector_over_large_positions_and_a_second_one_on_the_same_file(table: Table) -> None:
    rows = 140_000
    moments = pa.array([T0] * rows, UTC_TIME)
    table.append_table(
        pa.table(
            {
                "user_id": [f"u{index}" for index in range(rows)],
                "event_timestamp": moments,
                "created": moments,
                "amount": [float(index) for index in range(rows)],
                "count": pa.array([1] * rows, pa.int64()),
                "country": ["DE"] * rows,
            }
        )
    )
    path, gone = path_in_log(table, 0), {0, 65_535, 65_536, 131_072, 139_999}
    table.delete_rows(path, gone - {0})
    table.delete_rows(path, gone)

    opened = open_table(table.view)
    files = opened.snapshot_files()
    order, counts = opened.read_order(files)
    features = [block for _, block in opened.read_features(files, counts, order["position"])]

    assert counts.tolist() == [rows]
    kept = [index for index in range(rows) if index not in gone]
    assert order["position"].to_list() == kept
    assert [value for block in features for value in block["amount"].to_list()] == [float(index) for index in kept]


def test_file_with_every_row_deleted_gives_none(table: Table) -> None:
    table.append(row("a", 1), row("b", 2))
    table.delete_rows(path_in_log(table, 0), [0, 1])

    assert snapshot(table) == []


def test_deletion_vector_in_the_window_needs_a_rebuild(table: Table) -> None:
    table.append(row("a", 1), row("b", 2))
    table.delete_rows(path_in_log(table, 0), [0])

    needs_rebuild(table, 0, "commit 1 removed or rewrote rows")


def test_file_added_with_a_deletion_vector_needs_a_rebuild(table: Table) -> None:
    table.append(row("a", 1), row("b", 2))
    table.delete_rows(path_in_log(table, 0), [0])
    actions = [action for action in table.actions(1) if "remove" not in action]
    table.log_file(1).write_text("".join(json.dumps(action) + "\n" for action in actions))

    needs_rebuild(table, 0, "commit 1 added a file with a deletion vector")


# --- ties --------------------------------------------------------------------------------------------------------------


def test_tie_goes_to_the_later_commit(table: Table) -> None:
    table.append(row("a", 1, 1.0))
    table.append(row("a", 1, 2.0))
    table.append(row("a", 1, 3.0))

    assert latest(table)["a"]["amount"] == 3.0
    assert latest(table, after=0)["a"]["amount"] == 3.0


def test_tie_goes_to_the_later_commit_after_older_files_were_compacted(table: Table) -> None:
    table.append(row("a", 1, 1.0))
    table.append(row("x", 1, 1.0))
    table.delta.optimize.compact()
    table.append(row("a", 1, 2.0))

    assert latest(table)["a"]["amount"] == 2.0


def test_compaction_does_not_make_an_older_row_win(table: Table) -> None:
    table.create(partition_by=["country"])
    table.append(row("a", 1, 1.0, country="FR"))
    table.append(row("x", 1, 1.0, country="FR"))
    table.append(row("a", 1, 2.0, country="GB"))
    assert table.delta.optimize.compact()["numFilesRemoved"] == 2

    assert latest(table)["a"]["amount"] == 2.0


def test_tie_within_one_commit_is_the_same_row_every_time(table: Table) -> None:
    table.append(*(row("a", 1, float(index)) for index in range(50)))

    assert {latest(table)["a"]["amount"] for _ in range(10)} == {latest(table)["a"]["amount"]}


# --- what needs a rebuild ----------------------------------------------------------------------------------------------


def two_commits(table: Table) -> None:
    table.append(row("a", 1), row("b", 2))
    table.append(row("c", 3))


def test_delete_in_the_window_needs_a_rebuild(table: Table) -> None:
    two_commits(table)
    table.delta.delete("user_id = 'a'")

    needs_rebuild(table, 1, "commit 2 removed or rewrote rows")
    assert users(snapshot(table)) == ["b", "c"]


def test_delete_of_a_whole_file_in_the_window_needs_a_rebuild(table: Table) -> None:
    two_commits(table)
    table.delta.delete("user_id = 'c'")

    needs_rebuild(table, 0, "commit 2 removed or rewrote rows")


def test_update_in_the_window_needs_a_rebuild(table: Table) -> None:
    two_commits(table)
    table.delta.update(updates={"amount": "9.0"}, predicate="user_id = 'a'")

    needs_rebuild(table, 1, "commit 2 removed or rewrote rows")
    assert latest(table)["a"]["amount"] == 9.0


def test_merge_that_updates_in_the_window_needs_a_rebuild(table: Table) -> None:
    two_commits(table)
    merging = table.delta.merge(
        table.arrow([row("a", 5), row("z", 5)]), "s.user_id = t.user_id", source_alias="s", target_alias="t"
    )
    merging.when_matched_update_all().when_not_matched_insert_all().execute()

    needs_rebuild(table, 1, "commit 2 removed or rewrote rows")
    assert users(snapshot(table)) == ["a", "b", "c", "z"]


def test_merge_that_only_inserts_is_read(table: Table) -> None:
    two_commits(table)
    merging = table.delta.merge(
        table.arrow([row("y", 5), row("z", 5)]), "s.user_id = t.user_id", source_alias="s", target_alias="t"
    )
    merging.when_not_matched_insert_all().execute()

    try:
        assert users(added(table, 1)) == ["y", "z"]
    except RebuildNeeded as error:  # where the writer rewrote a file
        assert "removed or rewrote rows" in str(error)  # noqa: PT017


def test_overwrite_in_the_window_needs_a_rebuild(table: Table) -> None:
    two_commits(table)
    table.append_table(table.arrow([row("z", 9)]), mode="overwrite")

    needs_rebuild(table, 1, "commit 2 removed or rewrote rows")
    assert users(snapshot(table)) == ["z"]


def test_restore_in_the_window_needs_a_rebuild(table: Table) -> None:
    two_commits(table)
    table.delta.restore(0)

    needs_rebuild(table, 1, "commit 2 removed or rewrote rows")
    assert users(snapshot(table)) == ["a", "b"]


def test_restore_that_only_brings_rows_back_is_read_as_added(table: Table) -> None:
    two_commits(table)
    table.delta.delete()
    table.delta.restore(1)

    assert users(added(table, 2)) == users(snapshot(table)) == ["a", "b", "c"]
    assert {one["version"] for one in added(table, 2)} == {3}


def test_table_dropped_and_recreated_needs_a_rebuild(table: Table) -> None:
    two_commits(table)
    before = watermark(table, 1)
    shutil.rmtree(table.path)
    for minute in range(4):
        table.append(row("z", minute))
    opened = open_table(table.view)

    with pytest.raises(RebuildNeeded, match="the table was dropped and created again"):
        planned_files(opened, whole=False, interval=None, watermark=before)


def test_head_behind_the_watermark_needs_a_rebuild(table: Table) -> None:
    two_commits(table)
    table.log_file(1).unlink()

    needs_rebuild(table, 1, "the table's head is version 0, behind the watermark")


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


def test_added_compacted_and_vacuumed_file_needs_a_rebuild(table: Table) -> None:
    two_commits(table)
    table.append(row("d", 4))
    table.delta.optimize.compact()
    table.delta.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)

    needs_rebuild(table, 0, "2 data files were added, compacted and vacuumed since")
    assert users(snapshot(table)) == ["a", "b", "c", "d"]


def test_vacuum_of_files_from_before_the_watermark_costs_nothing(table: Table) -> None:
    two_commits(table)
    table.delta.optimize.compact()
    table.delta.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)
    last = table.version
    table.append(row("d", 4))

    assert users(added(table, 1)) == users(added(table, last)) == ["d"]


def test_data_file_that_is_lost_is_told(table: Table) -> None:
    two_commits(table)
    (table.path / path_in_log(table, 1)).unlink()

    with pytest.raises(OfflineStoreError, match=r"could not read Delta table .* Nothing was written"):
        snapshot(table)


def test_changed_partition_columns_need_a_rebuild(table: Table) -> None:
    table.create()
    table.append_table(table.arrow([]), mode="overwrite", schema_mode="overwrite", partition_by=["country"])
    if not any("metaData" in action for action in table.actions(1)):
        meta = next(action for action in table.actions(0) if "metaData" in action)
        meta["metaData"]["partitionColumns"] = ["country"]
        table.commit(meta)
    table.append(row("a", 1))
    table.commit(
        {"metaData": next(a["metaData"] for a in table.actions(0) if "metaData" in a)},
        *({"remove": {"path": path_in_log(table, table.version), "dataChange": False, "deletionTimestamp": 1}},),
        table.add_file("n.parquet", table.arrow([row("a", 1)])) | {},
    )

    needs_rebuild(table, 0, "changed the partition columns")


# --- what is refused ---------------------------------------------------------------------------------------------------


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


def test_timestamp_without_time_zone_is_refused(tmp_path: Path) -> None:
    naive = pa.schema([field.with_type(pa.timestamp("us")) if field.type == UTC_TIME else field for field in SCHEMA])
    table = Table(tmp_path / "t", schema=naive)
    table.create()

    with pytest.raises(OfflineStoreError, match="a timestamp without time zone") as caught:
        open_table(table.view)

    assert "event_timestamp 'event_timestamp'" in str(caught.value)
    assert "created_timestamp 'created'" in str(caught.value)


def test_feature_of_naive_timestamps_is_refused_and_an_unused_one_is_not(tmp_path: Path) -> None:
    table = Table(tmp_path / "t", schema=pa.schema([*SCHEMA, ("naive", pa.timestamp("us"))]))
    table.append(row("a", 1, naive=None))

    assert users(snapshot(table)) == ["a"]
    with pytest.raises(OfflineStoreError, match="feature 'naive': found a column of type timestamp_ntz"):
        open_table(table.change_view(features={"naive": "timestamp"}))


@pytest.mark.parametrize("mode", ["name", "id"])
def test_column_mapping_is_refused(table: Table, mode: str) -> None:
    table.create()
    actions = table.actions(0)
    for action in actions:
        if "protocol" in action:
            action["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}
        if "metaData" in action:
            schema = json.loads(action["metaData"]["schemaString"])
            for index, column in enumerate(schema["fields"]):
                column["metadata"] = {
                    "delta.columnMapping.id": index + 1,
                    "delta.columnMapping.physicalName": f"col-{index}",
                }
            action["metaData"]["schemaString"] = json.dumps(schema)
            action["metaData"]["configuration"] = {
                "delta.columnMapping.mode": mode,
                "delta.columnMapping.maxColumnId": "6",
            }
    table.log_file(0).write_text("".join(json.dumps(action) + "\n" for action in actions))

    with pytest.raises(OfflineStoreError, match="column mapping"):
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
        planned_files(opened, whole=False, interval=None, watermark=before)


def test_broken_data_file_is_told(table: Table) -> None:
    two_commits(table)
    (table.path / path_in_log(table, 0)).write_bytes(b"PAR1 this is no parquet file PAR1")

    with pytest.raises(OfflineStoreError, match="could not read Delta table"):
        snapshot(table)


def test_source_may_be_relative_a_link_or_a_file_uri(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.append(row("a", 1))
    (tmp_path / "link").symlink_to(table.path)
    monkeypatch.chdir(tmp_path)

    for source in ("table", "./table/", "link", f"file://{table.path}", f"{table.path}/../table"):
        table.change_view(source=source)
        assert users(snapshot(table)) == ["a"], source


def test_file_outside_of_the_table_is_read(table: Table, tmp_path: Path) -> None:
    table.create()
    action = table.add_file("x.parquet", table.arrow([row("a", 1), row("b", 2)]))
    (tmp_path / "other place").mkdir()
    (table.path / "x.parquet").rename(tmp_path / "other place" / "x.parquet")
    action["add"]["path"] = f"file://{tmp_path}/other%20place/x.parquet"
    table.commit(action)

    assert users(snapshot(table)) == users(added(table, 0)) == ["a", "b"]


def test_pinned_version_is_read_while_the_table_moves_on(table: Table) -> None:
    two_commits(table)
    opened = open_table(table.view, 0)
    table.append(row("d", 4))

    assert (opened.version, users(rows_of(opened, opened.snapshot_files()))) == (0, ["a", "b"])


def test_event_times_of_other_units_are_read_exactly(table: Table) -> None:
    table.create()
    moments = [T0 + timedelta(microseconds=1), T0 - timedelta(days=30_000, microseconds=7)]
    columns = {
        "user_id": ["a", "b"],
        "amount": [1.0, 2.0],
        "count": pa.array([1, 2], pa.int64()),
        "country": ["x", "y"],
    }
    times = pa.array(moments, UTC_TIME)
    nanoseconds = pa.table({**columns, "event_timestamp": times.cast(pa.timestamp("ns", tz="UTC")), "created": times})
    table.commit(table.add_file("ns.parquet", nanoseconds, version="2.6"))
    legacy = pa.table({**columns, "user_id": ["c", "d"], "event_timestamp": times, "created": times})
    table.commit(table.add_file("int96.parquet", legacy, use_deprecated_int96_timestamps=True))

    found = {one["user_id"]: one["event_us"] for one in snapshot(table)}
    assert found == {"a": to_us(moments[0]), "b": to_us(moments[1]), "c": to_us(moments[0]), "d": to_us(moments[1])}
