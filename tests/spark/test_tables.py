"""Tables as Spark makes and alters them: columns, types, times, clones. What cannot be followed says so, and a rebuild is exact."""

from __future__ import annotations

import math
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from materialize.errors import OfflineStoreError
from tests.spark.table import COLUMNS, SparkTable
from tests.tables import at, row

if TYPE_CHECKING:
    from pathlib import Path

    from tests.spark.session import SparkSession

pytestmark = pytest.mark.xdist_group("spark")  # one session for all

BY_NAME = {"delta.columnMapping.mode": "name"}
WIDENING = {"delta.enableTypeWidening": "true"}
FIRST = (row("a", 1, 1.0), row("b", 2, 2.0), row("c", 3, math.nan, count=None, country=None))


# --- columns ---------------------------------------------------------------------------------------------------------


def test_columns_that_the_view_does_not_read_may_change(table: SparkTable) -> None:
    table.create(columns=COLUMNS | {"extra": "INT"}, properties=BY_NAME)
    table.insert(*FIRST)
    table.incremental()

    table.sql("ALTER TABLE {t} RENAME COLUMN extra TO other")
    table.sql("ALTER TABLE {t} ADD COLUMN later DATE")
    table.sql("ALTER TABLE {t} ALTER COLUMN amount FIRST")
    table.insert(row("a", 9, 9.0, later=date(2095, 1, 2)))
    table.sql("ALTER TABLE {t} DROP COLUMN other")
    table.sql("UPDATE {t} SET later = DATE'2095-01-03'")
    assert table.follow().written == 1

    table.change_view(features={"amount": "float64", "later": "date"})
    assert table.incremental().reason.startswith("features: added later")
    table.check()


def test_mapping_that_is_switched_on_later_changes_nothing(table: SparkTable) -> None:
    table.create("PARTITIONED BY (country)")
    table.insert(*FIRST)
    table.incremental()

    table.set_properties(delta__columnMapping__mode="name")
    table.insert(row("a", 9, 9.0), row("d", 1, 4.0))
    table.sql("DELETE FROM {t} WHERE user_id = 'c'")
    assert table.follow().written == 2


def test_mapping_that_is_taken_away_needs_a_rebuild(table: SparkTable) -> None:
    table.create(properties=BY_NAME)
    table.insert(*FIRST)
    table.incremental()

    table.set_properties(delta__columnMapping__mode="none")
    table.insert(row("a", 9, 9.0))
    table.needs_rebuild("'user_id' is another one")
    assert not table.follow().changed


@pytest.mark.parametrize("name", ["amount", "count"])
def test_column_that_is_dropped_and_added_again_needs_a_rebuild(table: SparkTable, name: str) -> None:
    table.create(properties=BY_NAME)
    table.insert(*FIRST)
    table.incremental()

    table.sql(f"ALTER TABLE {{t}} DROP COLUMN {name}")
    with pytest.raises(OfflineStoreError, match=f"feature '{name}': found no such column"):
        table.incremental()
    table.sql(f"ALTER TABLE {{t}} ADD COLUMN {name} {COLUMNS[name]}")
    table.insert(row("a", 9, 9.0))
    table.needs_rebuild(f"'{name}' is another one")
    assert {one[name] for user, one in table.served().items() if user != "a"} == {None}
    table.insert(row("b", 9, 9.0))
    assert table.follow().written == 1


def test_columns_that_swap_their_names_need_a_rebuild(table: SparkTable) -> None:
    table.create(columns=COLUMNS | {"score": "DOUBLE"}, properties=BY_NAME)
    table.insert(*(one | {"score": 0.5} for one in FIRST))
    table.incremental()

    table.sql("ALTER TABLE {t} RENAME COLUMN amount TO old")
    table.sql("ALTER TABLE {t} RENAME COLUMN score TO amount")
    table.needs_rebuild("'amount' is another one")
    assert {one["amount"] for one in table.served().values()} == {(0.5).hex()}


def test_renamed_columns_are_followed_by_a_view_that_says_their_new_names(table: SparkTable) -> None:
    table.create(properties=BY_NAME)
    table.insert(*FIRST)
    table.incremental()

    for old, new in (("amount", "total"), ("user_id", "customer"), ("event_timestamp", "happened")):
        table.sql(f"ALTER TABLE {{t}} RENAME COLUMN {old} TO {new}")
    with pytest.raises(OfflineStoreError, match="3 problems"):
        table.incremental()
    table.change_view(join_keys=("customer",), event_timestamp="happened", features={"total": "float64"})
    assert table.incremental().changed
    table.check()


def test_widened_columns_are_read_exactly(table: SparkTable) -> None:
    columns = {"user_id": "INT", "event_timestamp": "TIMESTAMP", "amount": "FLOAT", "small": "TINYINT"}
    table.create(columns=columns | {"price": "DECIMAL(6,2)"}, properties=WIDENING)
    features = {"amount": "float64", "small": "int32", "price": "decimal(18,2)"}
    table.change_view(created_timestamp=None, features=features)

    def one(user: int, minutes: float, amount: float, small: int, price: str) -> dict[str, Any]:
        when = {"user_id": user, "event_timestamp": at(minutes)}
        return when | {"amount": amount, "small": small, "price": Decimal(price)}

    table.insert(one(1, 1, 0.1, 1, "1.25"), one(2, 1, math.nan, -128, "9999.99"), one(3, 1, -0.0, 127, "-0.01"))
    table.incremental()
    for column, kind in (
        ("user_id", "BIGINT"),
        ("amount", "DOUBLE"),
        ("small", "SMALLINT"),
        ("price", "DECIMAL(12,2)"),
    ):
        table.sql(f"ALTER TABLE {{t}} ALTER COLUMN {column} TYPE {kind}")
    table.insert(one(2**40, 2, 0.1, 300, "1234567890.12"), one(1, 2, 0.1, 3, "0.00"))
    table.sql("ALTER TABLE {t} ALTER COLUMN small TYPE INT")
    table.insert(one(4, 2, 1e300, 70_000, "1.00"))
    table.sql("DELETE FROM {t} WHERE user_id = 2")
    report = table.follow()
    assert (report.written, report.deleted) == (3, 1)  # the entity is found although its key has another type now

    table.sql("UPDATE {t} SET small = small + 1 WHERE user_id = 3")
    assert table.follow().written == 1


def test_column_that_is_widened_to_another_kind_needs_another_view(table: SparkTable) -> None:
    table.create(columns=COLUMNS | {"count": "INT"}, properties=WIDENING)
    table.insert(*FIRST)
    table.incremental()

    table.sql("ALTER TABLE {t} ALTER COLUMN count TYPE DOUBLE")
    table.insert(row("a", 9, 9.0, count=0.5))
    with pytest.raises(OfflineStoreError, match="feature 'count': found a column of type double"):
        table.incremental()
    table.change_view(features={"amount": "float64", "count": "float64"})
    table.incremental()
    table.check()


def test_column_that_becomes_a_decimal_is_refused_until_its_old_files_are_written_anew(table: SparkTable) -> None:
    table.create(columns=COLUMNS | {"count": "INT"}, properties=WIDENING)
    table.insert(*FIRST)
    table.sql("ALTER TABLE {t} ALTER COLUMN count TYPE DECIMAL(12,2)")
    table.change_view(features={"count": "decimal(12,2)"})
    with pytest.raises(OfflineStoreError, match="DROP FEATURE typeWidening"):
        table.incremental()

    table.sql("ALTER TABLE {t} DROP FEATURE typeWidening")
    assert table.incremental().written == 3
    table.check()


def test_every_type_is_read_exactly(table: SparkTable) -> None:
    kinds = {
        "flag": ("BOOLEAN", "bool", "true"),
        "tiny": ("TINYINT", "int8", "-128"),
        "short": ("SMALLINT", "int16", "32767"),
        "number": ("INT", "int32", "-2147483648"),
        "long": ("BIGINT", "int64", "9223372036854775807"),
        "half": ("FLOAT", "float32", "0.1"),
        "ratio": ("DOUBLE", "float64", "4.9E-324D"),
        "price": ("DECIMAL(38,10)", "decimal(38,10)", "-1234567890123456789012345678.0123456789BD"),
        "cents": ("DECIMAL(9,2)", "decimal(9,2)", "-0.01BD"),
        "name": ("STRING", "string", "'üé😀\\0'"),
        "bytes": ("BINARY", "binary", "X'00FF10'"),
        "day": ("DATE", "date", "DATE'1582-10-04'"),
        "moment": ("TIMESTAMP", "timestamp", "TIMESTAMP'1900-01-01 00:00:00.000001Z'"),
        "vector": ("ARRAY<FLOAT>", "list<float32,3>", "array(float(0.1), float('NaN'), float('-0.0'))"),
        "counts": ("ARRAY<BIGINT>", "list<int64>", "array(1, -9223372036854775808)"),
    }
    times = {"key": "INT", "day_key": "DATE", "event_timestamp": "TIMESTAMP"}
    table.create(columns=times | {name: kind for name, (kind, _, _) in kinds.items()}, properties=BY_NAME)
    table.change_view(join_keys=("key", "day_key"), created_timestamp=None)
    table.change_view(features={name: kind for name, (_, kind, _) in kinds.items()})
    when = "TIMESTAMP'2095-01-01 00:00:00.123456Z'"
    table.sql(f"INSERT INTO {{t}} SELECT 1, DATE'2095-01-01', {when}, {', '.join(text for *_, text in kinds.values())}")
    table.sql(f"INSERT INTO {{t}} SELECT 2, DATE'2095-01-01', {when}, {', '.join(['NULL'] * len(kinds))}")
    table.follow()

    table.sql("UPDATE {t} SET vector = array(float(1), float(2), float(3)), long = 1 WHERE key = 1")
    assert table.follow().written == 1


# --- times -----------------------------------------------------------------------------------------------------------


def test_timestamps_of_every_kind_of_parquet_file_are_read_exactly(table: SparkTable) -> None:
    table.create(columns=COLUMNS | {"seen": "TIMESTAMP"})
    table.change_view(features={"amount": "float64", "seen": "timestamp"})
    try:
        for minutes, kind in enumerate(("INT96", "TIMESTAMP_MILLIS", "TIMESTAMP_MICROS", "INT96"), start=1):
            table.sql(f"SET spark.sql.parquet.outputTimestampType = {kind}")
            table.insert(row("a", minutes, 1.0, seen=at(minutes)), row(kind, minutes + 1 / 60_000, 2.0, seen=None))
            table.follow()
        table.sql("UPDATE {t} SET amount = 3 WHERE user_id = 'TIMESTAMP_MILLIS'")  # in a file with other timestamps
        assert table.follow().written == 1
    finally:
        table.sql("SET spark.sql.parquet.outputTimestampType = TIMESTAMP_MICROS")


def test_times_without_a_zone_are_refused_unless_the_view_says_utc(table: SparkTable) -> None:
    naive = {name: kind.replace("TIMESTAMP", "TIMESTAMP_NTZ") for name, kind in COLUMNS.items()}
    table.create(columns=naive)
    table.insert(
        *(one | {name: one[name].replace(tzinfo=None) for name in ("event_timestamp", "created")} for one in FIRST)
    )
    with pytest.raises(OfflineStoreError, match="timestamp_ntz"):
        table.incremental()

    table.change_view(timestamp_ntz="UTC", features={"amount": "float64", "created": "timestamp"})
    table.follow()
    table.sql("UPDATE {t} SET event_timestamp = event_timestamp + INTERVAL 1 SECOND WHERE user_id = 'b'")
    assert table.follow().written == 1


def test_generated_partition_column_is_read(table: SparkTable) -> None:
    generated = "DATE GENERATED ALWAYS AS (CAST(event_timestamp AS DATE))"
    table.create("PARTITIONED BY (day)", columns=COLUMNS | {"day": generated})
    table.change_view(features={"amount": "float64", "day": "date"})
    table.insert(*FIRST, row("d", 2000, 4.0), row("d", 1, 0.0))
    table.incremental()

    table.sql("DELETE FROM {t} WHERE day = DATE'2095-01-02'")
    table.sql("UPDATE {t} SET event_timestamp = event_timestamp + INTERVAL 2 DAYS, day = NULL WHERE 1 = 0")
    table.insert(row("a", 5000, 5.0))
    report = table.follow()
    assert (report.written, report.deleted) == (2, 0)


# --- whole tables ----------------------------------------------------------------------------------------------------


def test_shallow_clone_is_read_where_its_files_are(table: SparkTable, spark: SparkSession, tmp_path: Path) -> None:
    original = SparkTable(spark, tmp_path / "original äö %41", table.store)
    original.create("PARTITIONED BY (country)", properties={"delta.enableDeletionVectors": "true"})
    original.insert(*FIRST, row("d", 1, 4.0, country="x y"))
    original.sql("DELETE FROM {t} WHERE user_id = 'c'")
    table.sql(f"CREATE TABLE {{t}} SHALLOW CLONE {original.name}")
    table.follow()

    table.insert(row("e", 1, 5.0))
    table.sql("DELETE FROM {t} WHERE user_id = 'a'")
    table.sql("UPDATE {t} SET amount = 8 WHERE user_id = 'd'")
    report = table.follow()
    assert (report.written, report.deleted) == (2, 1)


def test_table_that_is_dropped_and_created_again_needs_a_rebuild(spark: SparkSession, table: SparkTable) -> None:
    table.path = spark.folder / "managed"  # a managed table goes with its files
    table.change_view(source=str(table.path))
    typed = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    table.sql(f"CREATE TABLE managed ({typed}) USING delta")
    table.insert(*FIRST)
    table.incremental()

    table.sql("DROP TABLE managed")
    table.sql(f"CREATE TABLE managed ({typed}) USING delta")
    table.insert(row("a", 0, 0.0), row("z", 1, 1.0))
    report = table.needs_rebuild("dropped and created again")
    assert (report.written, report.deleted) == (2, 2)
    table.sql("DROP TABLE managed")


@pytest.mark.parametrize("clause", ["", "PARTITIONED BY (country)"], ids=["same", "partitioned"])
def test_table_that_is_replaced_needs_a_rebuild(table: SparkTable, clause: str) -> None:
    table.create()
    table.insert(*FIRST)
    table.incremental()

    table.sql(f"CREATE OR REPLACE TABLE {{t}} USING delta {clause} AS SELECT * FROM {{t}} WHERE user_id <> 'a'")
    assert table.needs_rebuild("created again|partition columns").deleted == 1
    table.insert(row("a", 0, 0.0))
    assert table.follow().written == 1
