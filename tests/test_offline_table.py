"""Rows of a Delta table at one version: every file, whatever it looks like, with the commit that brought its rows."""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import polars as pl
import pyarrow as pa
import pytest

from materialize.model import Interval, to_us
from materialize.offline import open_table, read_features, read_order, total_rows
from materialize.order import NO_CREATED
from tests.offline import (
    WIDE,
    added,
    latest,
    live_rows,
    path_in_log,
    rows_of,
    snapshot,
    two_commits,
    users,
)
from tests.tables import SCHEMA, T0, UTC_TIME, Table, at, row

if TYPE_CHECKING:
    from pathlib import Path


# --- rows and their commits ------------------------------------------------------------------------------------------


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
    assert total_rows((file.rows, file.size) for file in open_table(table.view).snapshot_files()) > 0


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
    found = read_order(opened, opened.snapshot_files())

    some = found.frame.filter(found.frame["position"] % 3 == 0)
    blocks = list(read_features(opened, found, some["position"]))

    assert found.counts.tolist() == [2, large, 1, 2]
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

    assert {"u2", "v2"} <= set(users(rows_of(opened, read_order(opened, files))))
    assert len(files) <= 3  # the hour itself, and neighbours whose bounds the log cuts to milliseconds


def test_only_rows_of_the_wanted_entities_are_read_and_files_without_them_are_not_opened(tmp_path: Path) -> None:
    table = Table(tmp_path / "t", schema=pa.schema([*SCHEMA, ("number", pa.int32())]))
    table.change_view(join_keys=("number",))
    for number in range(6):
        table.append(row("a", number, number=number), row("b", number, 5.0, number=-7 if number == 4 else None))
    opened = open_table(table.view)
    for version in (0, 5):
        (table.path / path_in_log(table, version)).unlink()

    found = read_order(
        opened, opened.snapshot_files(), of=pl.DataFrame({"number": [1, -7, 3, 99]}, {"number": pl.Int32})
    )

    assert found.frame["number"].sort().to_list() == [-7, 1, 3]
    assert len(rows_of(opened, found)) == 3


def test_pinned_version_is_read_while_the_table_moves_on(table: Table) -> None:
    two_commits(table)
    opened = open_table(table.view, 0)
    table.append(row("d", 4))

    assert (opened.version, users(rows_of(opened, live_rows(opened)))) == (0, ["a", "b"])


def test_event_times_of_other_units_are_read_exactly(table: Table) -> None:
    table.create()
    moments = [T0 + timedelta(microseconds=1), T0 - timedelta(days=30_000, microseconds=7)]
    far = [datetime(9999, 12, 31, tzinfo=timezone.utc), datetime(1600, 1, 1, tzinfo=timezone.utc)]  # not in nanoseconds
    expected = {}

    def add(name: str, first: str, events: list[datetime], unit: str = "us", **options: Any) -> None:
        users, times = [f"{first}0", f"{first}1"], pa.array(events, UTC_TIME)
        expected.update(zip(users, map(to_us, events), strict=True))
        rows = {"user_id": users, "event_timestamp": times.cast(pa.timestamp(unit, tz="UTC")), "created": times}
        others = {"amount": [1.0, 2.0], "count": pa.array([1, 2], pa.int64()), "country": ["x", "y"]}
        table.commit(table.add_file(name, pa.table(rows | others), **options))

    add("ns.parquet", "n", moments, "ns", version="2.6")
    add("ms.parquet", "m", far, "ms")
    add("int96.parquet", "i", moments, use_deprecated_int96_timestamps=True)
    add("spark.parquet", "s", far, use_deprecated_int96_timestamps=True, store_schema=False)

    assert {one["user_id"]: one["event_us"] for one in snapshot(table)} == expected


# --- ties ------------------------------------------------------------------------------------------------------------


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


# --- where the files are ---------------------------------------------------------------------------------------------


def test_source_may_be_relative_a_link_or_a_file_uri(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.append(row("a", 1))
    (tmp_path / "link").symlink_to(table.path)
    monkeypatch.chdir(tmp_path)

    for source in ("table", "./table/", "link", f"file://{table.path}", f"{table.path}/../table"):
        table.change_view(source=source)
        assert users(snapshot(table)) == ["a"], source


@pytest.mark.parametrize("scheme", ["file:", "file://", ""], ids=["as Java writes it", "URI", "path"])
@pytest.mark.parametrize("place", ["other place", "100%/ü"])
def test_file_outside_of_the_table_is_read(table: Table, tmp_path: Path, scheme: str, place: str) -> None:
    table.create(partition_by=["country"])
    rows = [row("a", 1, 2.0, country="FR"), row("b", 1, country="FR")]
    action = table.add_file("x.parquet", table.arrow(rows), partition={"country": "FR"})
    (tmp_path / place).mkdir(parents=True)
    (table.path / "x.parquet").rename(tmp_path / place / "x.parquet")
    action["add"]["path"] = f"{scheme}{quote(str(tmp_path))}/{quote(place)}/x.parquet"
    table.commit(action)

    for found in (snapshot(table), added(table, 0)):
        assert {one["user_id"]: (one["amount"], one["country"]) for one in found} == {
            "a": (2.0, "FR"),
            "b": (0.0, "FR"),
        }


# --- partition values ------------------------------------------------------------------------------------------------


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
